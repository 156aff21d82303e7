"""`reef prove`: runs a probe through an adapter and its base, and says what the adapter changes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reef.progress import progress
from reef.refusal import refusing
from reef.store_options import DEFAULT_TENANT, with_store

if TYPE_CHECKING:
    from adapter_store.names import AdapterRef
    from adapter_store.store import AdapterStore


REFUSED = 1


@click.command()
@click.argument("name")
@click.option(
    "--model",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The folder of the base.",
)
@click.option("--tenant", default=DEFAULT_TENANT, show_default=True, help="Whose adapter it is.")
@click.option(
    "--quantization", default="none", show_default=True, help="As in the server's config."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@with_store
def prove(store: "AdapterStore", name: str, model: Path, tenant: str, **engine: Any) -> None:
    """Prove that NAME[@VERSION|@ALIAS] acts as its weights say.

    A server does the same before an adapter's first answer. Here it is known before any client
    asks. The verdict is stored, and shown in lists. Ends with status 1 if the server would refuse
    the adapter.
    """
    ref = store.resolve(tenant, name)
    _check_base(store, ref, model)
    prove_ref(store, ref, model, **engine)


def prove_ref(store: "AdapterStore", ref: "AdapterRef", model: Path, **engine: Any) -> None:
    """Prove a version, store the verdict and print it. Raises Exit if it is refused."""
    from deployments.replica.verdict_writer import make_verdict
    from engine.config import ConfigError, EngineConfig
    from engine.messages import AdapterFolder
    from engine.model.spec import ModelError
    from engine.proof.alone import prove_alone

    with refusing(ConfigError, ModelError), store.pinned(ref) as folder:
        config = EngineConfig(str(model), structured_output="off", max_model_len=64, **engine)
        proof, verdict, computer = prove_alone(config, AdapterFolder(ref.digest, str(folder)))
    if verdict is not None:
        store.note_verdict(ref.digest, make_verdict(verdict, computer))
    if proof.failure:
        click.echo(f"reef: {proof.failure}", err=True)
        raise click.exceptions.Exit(REFUSED)
    if proof.warning:
        click.echo(f"warning: {proof.warning}", err=True)
    click.echo(
        f"{ref.tenant}/{ref.name}@{ref.version} changes the logprobs of a probe by up to "
        f"{proof.effect:.3g}; they are right within {proof.error:.2g} (allowed {proof.margin:.2g})"
    )


def _check_base(store: "AdapterStore", ref: "AdapterRef", model: Path) -> None:
    num_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    with progress("hashing the base", num_bytes) as on_bytes:
        fingerprint = store.fingerprint(model, on_bytes)
    if fingerprint != ref.base:
        raise click.ClickException(
            f"{ref.tenant}/{ref.name}@{ref.version} was made for base {ref.base[:12]}; "
            f"{model} is {fingerprint[:12]}"
        )
