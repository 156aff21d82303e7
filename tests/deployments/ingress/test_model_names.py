"""Model names: which are a base, which an adapter, and which no model can have."""

import pytest

from deployments.ingress.model_names import ModelName, parse_model_name

BASES = ["demo", "org/demo", "org/demo:x"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("demo", ModelName(base="demo")),
        ("org/demo", ModelName(base="org/demo")),  # not an adapter of the tenant org
        ("sql", ModelName(adapter_name="sql")),
        ("sql@3", ModelName(adapter_name="sql@3")),
        ("sql@prod", ModelName(adapter_name="sql@prod")),
        ("acme/sql@3", ModelName(tenant="acme", adapter_name="sql@3")),
        ("demo:sql@3", ModelName(base="demo", adapter_name="sql@3")),
        ("org/demo:acme/sql", ModelName(base="org/demo", tenant="acme", adapter_name="sql")),
        ("org/demo:x:sql", ModelName(base="org/demo:x", adapter_name="sql")),  # the longest base
    ],
)
def test_a_model_name_is_a_base_or_an_adapter(text: str, wanted: ModelName) -> None:
    assert parse_model_name(text, BASES) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@3",
        "sql@",
        "a/b/c",
        "other:sql",
        "sql@1@2",
        "../sql",
        "sql ",
        "demo:",
        "-sql",
        "a" * 97,
    ],
)
def test_an_impossible_model_name_is_none(text: str) -> None:
    assert parse_model_name(text, BASES) is None
