"""Describe an adapter: the modules it changes, their ranks and scalings, and its digest.

`prepare` checks an upload completely and computes its identity: the digest of its weights, of the
settings that matter, of what it brings beside them (a chat template, a tokenizer, generation
settings) and of its base. Knows nothing of names, versions or stores.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adapter_store.bases import BaseModel
from adapter_store.conversion.record import ConversionRecord, parse_record
from adapter_store.errors import AdapterInvalid, StoreCorrupt
from adapter_store.layout import (
    MAX_NEW_ROWS,
    WEIGHTS_NAME,
    LoraLayout,
    LoraModule,
    SavedTensor,
    TokenRows,
    is_vocabulary,
    layout_of,
    read_adapter,
    vocab_rows,
)
from adapter_store.object_store import OnBytes
from adapter_store.own_files import OWN_NAMES, read_own_files
from adapter_store.patterns import Pattern
from adapter_store.peft_config import CONFIG_NAME, LoraSettings
from adapter_store.plain_origin import PlainOrigin, parse_origin
from adapter_store.recipes import Recipe, parse_recipe
from adapter_store.safetensors_file import find_not_finite, hash_file
from adapter_store.tensor_causes import unknown_module
from adapter_store.wrapped_names import plain_name, whole_name

MANIFEST_NAME = "manifest.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """The size and the SHA-256, in hexadecimal, of one file."""

    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """An adapter's identity, sizes and modules, all computed from its files and its base."""

    digest: str
    base: str  # fingerprint
    lora_rank: int  # of the widest module
    num_parameters: int
    nbytes: int  # of the files together, without the manifest
    files: Mapping[str, FileEntry]
    modules: Mapping[str, LoraModule]
    recipe: Recipe | None = None  # of an adapter that is combined from others
    replaced: Mapping[str, SavedTensor] = field(default_factory=dict[str, SavedTensor])
    conversion: ConversionRecord | None = None  # of an upload that was no PEFT LoRA folder
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict[str, TokenRows])
    origin: PlainOrigin | None = None  # of an adapter that nobody has published

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The last parts of the modules' names, e.g. q_proj."""
        return tuple(sorted({name.rpartition(".")[2] for name in self.modules}))

    @property
    def vocab_size(self) -> int:
        """The rows of its own embedding, if its files tell; 0: those of the base."""
        return max(vocab_rows(self.modules, self.replaced).values(), default=0)

    def to_json(self) -> bytes:
        """Encode the manifest for the object store; the inverse of `parse_manifest`."""
        fields = asdict(self)
        fields["modules"] = {name: _set_ones(m) for name, m in fields["modules"].items()}
        for name in ("recipe", "replaced", "conversion", "token_rows", "origin"):
            if not fields[name]:
                del fields[name]
        return json.dumps(fields, indent=1, sort_keys=True).encode()


def _set_ones(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """A checked upload, ready to be stored; `config` is rewritten, `weights` are the upload's.

    `own_files` are the contents of what it brings beside the weights, by the names of OWN_NAMES.
    """

    manifest: AdapterManifest
    config: bytes
    weights: Path
    own_files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])


def is_digest(text: str) -> bool:
    """Check that a text is 64 lower-case hexadecimal digits."""
    return _DIGEST.fullmatch(text) is not None


def prepare(
    folder: Path,
    base: BaseModel,
    on_bytes: OnBytes,
    conversion: ConversionRecord | None = None,
) -> PreparedAdapter:
    """Check an upload completely, weights included, and compute its digest.

    Reads the weights twice; `on_bytes` is called with the bytes read since its last call. A record
    of the folder's conversion is kept in the manifest. Raises AdapterInvalid.
    """
    settings, tensors = read_adapter(folder)
    layout = layout_of(settings, tensors)
    _check_base(layout, base)
    _check_whole(settings, layout, base)
    rows = vocab_rows(layout.modules, layout.replaced).values()
    own_files = read_own_files(folder, base.text, max(rows, default=0))
    weights = folder / WEIGHTS_NAME
    try:
        bad = find_not_finite(weights, tensors, on_bytes)
        sha256 = hash_file(weights, on_bytes)
    except (OSError, ValueError) as error:
        raise AdapterInvalid(f"{weights} cannot be read: {error}") from error
    if bad is not None:
        raise AdapterInvalid(f"tensor {bad} holds a NaN or an infinity")
    config = canonical_config(
        {name: settings.lora_rank(name) for name in layout.modules},
        {name: settings.alpha(name) for name in layout.modules},
        settings.use_rslora,
        _kind_settings(settings, layout),
    )
    files = {
        CONFIG_NAME: FileEntry(len(config), hashlib.sha256(config).hexdigest()),
        WEIGHTS_NAME: FileEntry(weights.stat().st_size, sha256),
    }
    for name, content in own_files.items():
        files[name] = FileEntry(len(content), hashlib.sha256(content).hexdigest())
    manifest = AdapterManifest(
        digest=adapter_digest(base.fingerprint, files),
        base=base.fingerprint,
        lora_rank=layout.lora_rank,
        num_parameters=layout.num_parameters,
        nbytes=sum(file.nbytes for file in files.values()),
        files=files,
        modules=layout.modules,
        replaced=layout.replaced,
        conversion=conversion,
        token_rows=layout.token_rows,
    )
    return PreparedAdapter(manifest, config, weights, own_files)


def parse_manifest(raw: bytes, digest: str) -> AdapterManifest:
    """Decode the manifest of this digest; StoreCorrupt if it is damaged or another adapter's."""
    try:
        data: dict[str, Any] = json.loads(raw)
        files = {
            name: FileEntry(int(entry["nbytes"]), str(entry["sha256"]))
            for name, entry in data.pop("files").items()
        }
        modules = {name: LoraModule(**entry) for name, entry in data.pop("modules").items()}
        replaced = {
            name: SavedTensor(**entry | {"shape": tuple(entry["shape"])})
            for name, entry in data.pop("replaced", {}).items()
        }
        token_rows = {
            name: TokenRows(**entry | {"token_ids": tuple(entry["token_ids"])})
            for name, entry in data.pop("token_rows", {}).items()
        }
        found = data.pop("recipe", None)
        recipe = None if found is None else parse_recipe(found)
        conversion = data.pop("conversion", None)
        origin = data.pop("origin", None)
        manifest = AdapterManifest(
            **data,
            files=files,
            modules=modules,
            recipe=recipe,
            replaced=replaced,
            conversion=None if conversion is None else parse_record(conversion),
            token_rows=token_rows,
            origin=None if origin is None else parse_origin(origin),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreCorrupt(f"the manifest of {digest} is damaged: {error!r}") from error
    is_complete = set(files) - {*OWN_NAMES} == {CONFIG_NAME, WEIGHTS_NAME}
    made_of = recipe or manifest.origin  # else it is known by its files
    base = manifest.base
    expected = adapter_digest(base, files) if made_of is None else made_of.digest(base)
    if not is_complete or expected != digest:
        raise StoreCorrupt(f"the manifest of {digest} describes other files")
    return manifest


def adapter_digest(base: str, files: Mapping[str, FileEntry]) -> str:
    """Compute an adapter's digest from its base's fingerprint and the entries of its files.

    The config among the files must be the canonical one that `prepare` writes.
    """
    parts = {"base": base, "files": {name: entry.sha256 for name, entry in files.items()}}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def canonical_config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    use_rslora: bool,
    kinds: Mapping[str, object] | None = None,
) -> bytes:
    """Write the PEFT configuration of modules with these ranks and alphas.

    Patterns become one entry per module that differs from the first, so neither the spelling of a
    pattern nor a training option changes the digest. `kinds` are the keys that only some adapters
    have.
    """
    names = sorted(ranks)
    r, alpha = ranks[names[0]], _number(alphas[names[0]])
    numbers = {name: _number(alphas[name]) for name in names}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "bias": "none",
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "target_modules": names,
        "rank_pattern": {re.escape(name): ranks[name] for name in names if ranks[name] != r},
        "alpha_pattern": {re.escape(n): number for n, number in numbers.items() if number != alpha},
        **(kinds or {}),
    }
    return json.dumps(config, indent=1, sort_keys=True).encode()


def _number(value: float) -> float:
    """Make a whole number an int, so that 16 and 16.0 are written alike."""
    return int(value) if value == int(value) else value


def _kind_settings(settings: LoraSettings, layout: LoraLayout) -> dict[str, object]:
    """List the keys of what goes beyond A and B."""
    keys: dict[str, object] = {}
    if settings.use_dora:
        keys["use_dora"] = True
    if settings.lora_bias:
        keys["lora_bias"] = True
    if any(name.endswith(".bias") for name in layout.replaced):
        keys["bias"] = "all"
    if settings.group_size:
        keys |= {"use_qalora": True, "qalora_group_size": settings.group_size}
    if settings.block_diagonal is not None:
        names = {name: settings.name(name) for name in layout.modules}
        keys["use_bdlora"] = settings.block_diagonal.to_config(names)
    if settings.invocation_token_ids:
        keys["alora_invocation_tokens"] = list(settings.invocation_token_ids)
    copies = [name for name, saved in layout.replaced.items() if not saved.is_base]
    names = sorted(name.removesuffix(".weight") for name in copies if name.endswith(".weight"))
    if names:
        keys["modules_to_save"] = names
    if layout.token_rows:
        keys["trainable_token_indices"] = {
            name: list(rows.token_ids) for name, rows in sorted(layout.token_rows.items())
        }
    return keys


def _check_base(layout: LoraLayout, base: BaseModel) -> None:
    known = {whole_name(plain_name(name)): shape for name, shape in base.modules.items()}
    for name, module in layout.modules.items():
        if is_vocabulary(name):
            continue
        shape = known.get(whole_name(name))
        if shape is None:
            raise AdapterInvalid(unknown_module(name, base.modules))
        if not module.fits(*shape):
            raise AdapterInvalid(
                f"{name} is {shape[0]} x {shape[1]} in the base, but the adapter was made for "
                f"{module.out_features} x {module.in_features}"
            )
    if base.parameters:
        parameters = {whole_name(plain_name(n)): shape for n, shape in base.parameters.items()}
        _check_parameters(layout, parameters)


def _check_whole(settings: LoraSettings, layout: LoraLayout, base: BaseModel) -> None:
    """Refuse a file that lost modules: PEFT saves each one that the config selects.

    Not where a pattern means modules by the names that they had in a wrapped model.
    """
    if settings.names and isinstance(settings.targets.modules, Pattern):
        return
    changed = {whole_name(name) for name in layout.modules}
    changed |= {whole_name(name.rpartition(".")[0]) for name in layout.replaced}
    selected = [n for n in base.modules if settings.include(n) and not is_vocabulary(n)]
    lost = [name for name in selected if whole_name(plain_name(name)) not in changed]
    if lost:
        raise AdapterInvalid(
            f"{WEIGHTS_NAME} has no tensor of {lost[0]}, which target_modules selects "
            f"({len(lost)} of {len(selected)} such modules are missing): the file is cut or was "
            "filtered. Save it again, or select in target_modules, exclude_modules and "
            "layers_to_transform what it holds"
        )


def _check_parameters(layout: LoraLayout, parameters: Mapping[str, tuple[int, ...]]) -> None:
    embedding = _own_embedding(layout, parameters)
    for name, saved in layout.replaced.items():
        module = name.rpartition(".")[0]
        found = embedding if is_vocabulary(module) else parameters.get(whole_name(name))
        if found is None:
            raise AdapterInvalid(f"{saved.tensor} replaces {name}, which the base does not have")
        fits = saved.shape == found
        if not fits:
            raise AdapterInvalid(f"{saved.tensor} is {saved.shape}; {name} of the base is {found}")
    for name, module in layout.modules.items():
        if is_vocabulary(name):
            width, rows = module.in_features, module.out_features
            if name.endswith("embed_tokens"):
                width, rows = rows, width
            if (rows, width) != embedding:
                raise AdapterInvalid(
                    f"{name} has a matrix of {embedding[0]} x {embedding[1]}, but its factors are "
                    f"for {rows} x {width}"
                )
    for name, rows in layout.token_rows.items():
        if rows.hidden_size != embedding[1]:
            raise AdapterInvalid(
                f"{rows.tensor} has rows of {rows.hidden_size}; {name} of the base has "
                f"{embedding[1]}"
            )
        if max(rows.token_ids) >= embedding[0]:
            raise AdapterInvalid(
                f"{rows.tensor} has a row of token id {max(rows.token_ids)}; {name} has "
                f"{embedding[0]} rows"
            )


def _own_embedding(
    layout: LoraLayout, parameters: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    """Return the shape that embedding and output layer have with the adapter, which may have more
    rows than the base, or fewer."""
    rows, width = parameters.get(_EMBEDDING, (0, 0))
    found = vocab_rows(layout.modules, layout.replaced)
    own = max(found.values(), default=rows)
    for tensor, num_rows in found.items():
        if num_rows != own:
            longer = max(found, key=lambda name: found[name])
            raise AdapterInvalid(
                f"{tensor} has {num_rows} rows of token ids and {longer} {own}; embedding and "
                "output layer must have the same"
            )
    if own == rows:
        return own, width
    if own > rows + MAX_NEW_ROWS:
        raise AdapterInvalid(
            f"the adapter has {own} token ids, the base {rows}; at most {MAX_NEW_ROWS} more are "
            "served"
        )
    told = {whole_name(name) for name in layout.replaced}
    if own < rows:
        told |= {f"{whole_name(name)}.weight" for name in layout.modules}
    for name in (_EMBEDDING, _HEAD):
        if name in parameters and name not in told:
            raise AdapterInvalid(
                f"the adapter has {own} token ids, the base {rows}, so it must bring all rows of "
                f"{name.removesuffix('.weight')} too: save it with save_embedding_layers=True"
            )
    return own, width
