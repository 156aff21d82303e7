"""`reef profile`: measures this machine for `reef simulate`."""

import tempfile
from pathlib import Path

import click

from reef.progress import progress
from reef.refusal import refusing


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", help="The id of the model, if the config has several.")
@click.option(
    "--seconds",
    type=click.FloatRange(5, 3600),
    default=60.0,
    show_default=True,
    help="Of steps; loading comes before.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write here instead of printing.")
def profile(config: Path, model: str | None, seconds: float, out: Path | None) -> None:
    """Measure this machine for simulations.

    Runs the engine of CONFIG, a Serve config file, over batches of many sizes, with adapters of
    random numbers, and writes the blocks `profile` and `fleet.size` of a simulation's file. Nothing
    else should run meanwhile.
    """
    import yaml

    from adapter_store.errors import AdapterStoreError
    from deployments.config import load_config
    from deployments.local.serve_yaml import read_application
    from engine.config import ConfigError
    from engine.model.spec import ModelError
    from engine.profiling.measure import measure, num_phases
    from reef import profiling

    with refusing(ConfigError, ModelError, AdapterStoreError, OSError, ValueError):
        app = load_config(read_application(config)["args"])
        section = next((m for m in app.models if m.id == (model or app.models[0].id)), None)
        if section is None:
            ids = ", ".join(m.id for m in app.models)
            raise ConfigError(f"--model {model!r} is not a model of {config}; it has {ids}")
        engine = app.engine_config(section)
        with tempfile.TemporaryDirectory() as folder:
            with progress("measuring", num_phases(engine), " phases") as advance:
                measured = measure(engine, Path(folder) / "new", seconds=seconds, watch=advance)
            fetches = profiling.time_fetches(app.adapters, Path(folder) / "disk")
        fitted, fit = profiling.fit(measured, fetches)
        size = profiling.size_of(measured.engine)
    lines = [
        f"# {len(measured.steps)} steps of {section.id}; the median one is missed by "
        f"{fit.median_error:.1%}, one in ten by more than {fit.p90_error:.1%}.",
        "# cold_start is the engine's start in this process: add what Ray and a new node take.",
    ]
    if not fetches:
        lines.append("# load.fetch is a guess: the config's store holds no adapter to fetch.")
    document = profiling.as_document(fitted, size)
    text = "\n".join(lines) + "\n" + yaml.safe_dump(document, sort_keys=False)
    with refusing(OSError):
        if out is None:
            click.echo(text, nl=False)
        else:
            out.write_text(text)
