"""Compares the engine steps of two checkouts: decodes of the same model, in turns.

    python -m tests.bench.step_pair half ../before . --formats none int8 nf4 --batches 1 8

Each checkout computes in a process of its own, with its own code and its own environment, and keeps
its engines; the processes take turns, A, B, B, A, ... A format of B alone follows a colon:
`nf4:nf4+a16` compares nf4 in A with nf4, exact activations, in B.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve()
WORKER = "--worker"


@dataclass(frozen=True, slots=True)
class Case:
    forms: tuple[str, str]  # of A and of B
    batch: int
    prefill: int = 0

    def __str__(self) -> str:
        what = f"prefill {self.prefill}" if self.prefill else f"decode x{self.batch}"
        a, b = self.forms
        return f"{a if a == b else f'A {a}, B {b}'} | {what} | base"


class Side:
    """One checkout's process."""

    def __init__(self, checkout: Path, settings: dict[str, Any]) -> None:
        root = checkout.resolve()
        python = root / ".venv" / "bin" / "python"
        command = [str(python if python.exists() else sys.executable), str(FILE), WORKER]
        self._process = subprocess.Popen(
            [*command, json.dumps(settings)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def kernels(self) -> str:
        """Wait until the models are loaded, and name what computes them; called once, first."""
        return self._answer()

    def seconds(self, form: str, case: Case) -> list[float]:
        assert self._process.stdin is not None
        print(json.dumps([form, case.batch, case.prefill]), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self._process.args} ended")
        return json.loads(line)


def main() -> None:
    from tests.bench.environment import append_row, commit, comparison, header, in_turns

    options = _parse()
    forms = [(a, b or a) for a, _, b in (form.partition(":") for form in options.formats)]
    settings = {"shape": options.shape, "threads": options.threads, "steps": options.steps}
    settings["prompt"] = options.prompt
    sides = [
        Side(checkout, {**settings, "formats": list(dict.fromkeys(own))})
        for checkout, own in zip((options.a, options.b), zip(*forms, strict=True), strict=True)
    ]
    kernels = ", ".join(side.kernels() for side in sides)
    cases = [Case(*c) for c in product(forms, options.batches)]
    cases += [Case(form, 1, prefill) for form, prefill in product(forms, options.prefills)]
    pairs: dict[Case, list[tuple[float, float]]] = {case: [] for case in cases}
    for number in range(options.rounds):
        for case in cases:
            a, b = in_turns(
                number,
                lambda case=case: statistics.median(sides[0].seconds(case.forms[0], case)),
                lambda case=case: statistics.median(sides[1].seconds(case.forms[1], case)),
            )
            rows = case.prefill or case.batch
            pairs[case].append((rows / a, rows / b))
    conditions = header(0, f"A {commit(options.a)}, B {commit(options.b)}")
    for case, measured in pairs.items():
        row = f"{conditions} | step pair | {options.shape} | {case} | {kernels} | "
        row += f"prompt {options.prompt} | tokens/s "
        append_row(options.rows, row + comparison(measured, 1))
    for side in sides:
        side.close()


def serve(settings: dict[str, Any]) -> None:
    """Run cases that come as lines, with the code of the checkout that PYTHONPATH names."""
    import torch

    from tests.bench import step_bench
    from tests.bench.models import SHAPES

    threads = settings["threads"]
    torch.set_num_threads(threads)
    shape = SHAPES[settings["shape"]]
    step_bench.PROMPT = settings["prompt"]
    options = argparse.Namespace(kernels="auto", chunk=512, threads=threads)
    engines = {form: step_bench.make_engine(shape, form, options) for form in settings["formats"]}
    print(json.dumps(next(iter(engines.values())).info.kernels), flush=True)
    for line in sys.stdin:
        form, batch, prefill = json.loads(line)
        case = step_bench.Case(form, batch, "base", prefill)
        seconds = step_bench.run(engines[form], case, {}, settings["steps"])
        print(json.dumps(seconds), flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Engine steps of two checkouts, in turns.")
    parser.add_argument("shape")
    parser.add_argument("a", type=Path, help="a checkout, with its environment in .venv")
    parser.add_argument("b", type=Path, help="another one")
    parser.add_argument("--formats", nargs="+", default=["none", "int8", "nf4"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--prefills", nargs="*", type=int, default=[])
    parser.add_argument("--prompt", type=int, default=128, help="tokens, at most 4000")
    parser.add_argument("--steps", type=int, default=20, help="measured per case and round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=Path, help="append the rows to this file")
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        del sys.path[0]  # this folder, whose names are not those of packages
        serve(json.loads(sys.argv[2]))
    else:
        main()
