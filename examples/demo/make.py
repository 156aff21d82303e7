"""Makes the demo: `python -m examples.demo.make OUT [--seed N]`.

    OUT/base              transformers folder, float32, with tokenizer and chat template
    OUT/adapters/<name>   peft folders
    OUT/heldout.json      name -> [{"prompt", "answer"}], never trained or tuned on
    OUT/recipe.json       the recipe that it is made with
    OUT/report.json       what was trained, how long it took, and the scores; written last

Each part is written under a temporary name and renamed, so a part that exists is complete, and an
interrupted run continues with the first missing part. Needs no network. `parts` makes the contents
of each part.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from adapter_store.file_lock import exclusive_lock
from examples.demo.recipe import DEFAULT_RECIPE, Recipe


class OtherDemo(ValueError):
    """Raised if the folder holds parts of a demo that was made with another recipe."""


def ensure_demo(out: Path, recipe: Recipe = DEFAULT_RECIPE) -> Path:
    """Make the missing parts in `out`; returns `out`, at once if all parts exist.

    A complete demo is kept, even if it was made with another recipe; a partial one is only
    continued with its own recipe, else OtherDemo is raised.
    """
    if not _is_complete(out, recipe):
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            _claim(out, recipe)
            if not _is_complete(out, recipe):  # another process may have made them
                _make_missing(out, recipe)
    return out


def _is_complete(out: Path, recipe: Recipe) -> bool:
    parts = ["base", *(f"adapters/{adapter.job}" for adapter in recipe.adapters)]
    return all((out / part).exists() for part in (*parts, "heldout.json", "report.json"))


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Allow one process at a time; another one waits, then finds the parts made."""
    with exclusive_lock(out / ".lock"):
        for abandoned in (*out.glob(".base-*"), *out.glob("adapters/.*-*")):
            shutil.rmtree(abandoned)  # left by a run that was killed
        yield


def _claim(out: Path, recipe: Recipe) -> None:
    """Record the folder's recipe, as parts of two recipes do not fit together."""
    claim, wanted = out / "recipe.json", json.loads(json.dumps(asdict(recipe)))
    if not claim.exists():
        _write_json(claim, wanted)
    held = json.loads(claim.read_text())
    if held != wanted:
        other = [f"{k} {held.get(k)!r}, not {v!r}" for k, v in wanted.items() if held.get(k) != v]
        raise OtherDemo(
            f"{out} holds a demo made with {'; '.join(other)}: delete it or name another folder"
        )


def _make_missing(out: Path, recipe: Recipe) -> None:
    # OpenMP's threads spin while they wait for each other, by default for so long that training is
    # several times slower if anything else runs on the machine. Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Imported here because a finished demo needs neither peft nor the seconds to import it.
    from examples.demo import parts

    with parts.quiet_transformers():
        _make_part(out / "base", partial(parts.make_base, recipe=recipe))
        for adapter in recipe.adapters:
            make = partial(parts.make_adapter, base=out / "base", adapter=adapter, recipe=recipe)
            _make_part(out / "adapters" / adapter.job, make)
        held_out = parts.draw_held_out(recipe)
        listed = {name: [e._asdict() for e in examples] for name, examples in held_out.items()}
        _write_json(out / "heldout.json", listed)
        _write_json(out / "report.json", parts.report(out, held_out, recipe))


def _make_part(place: Path, make: Callable[[Path], None]) -> None:
    if place.exists():
        return
    place.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as temporary:
        unfinished = Path(temporary) / place.name
        unfinished.mkdir()
        make(unfinished)
        unfinished.rename(place)


def _write_json(place: Path, content: Any) -> None:
    unfinished = place.with_name(f".{place.name}")
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    unfinished.rename(place)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's base model and adapters.")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--seed", type=int, default=DEFAULT_RECIPE.seed)
    arguments = parser.parse_args()
    recipe = replace(DEFAULT_RECIPE, seed=arguments.seed)
    made = json.loads((ensure_demo(arguments.out, recipe) / "report.json").read_text())
    if made["seed"] != arguments.seed:
        parser.error(f"{arguments.out} holds the demo of seed {made['seed']}: name another folder")
    print(f"{arguments.out}: trained in {made['training']['seconds']:.0f} s")
    for name, adapter in made["adapters"].items():
        print(
            f"  {name:10} {adapter['exact_match']:6.1%} of the held-out prompts exactly right "
            f"(the base alone {adapter['base_exact_match']:.1%}): {adapter['does']}"
        )


if __name__ == "__main__":
    main()
