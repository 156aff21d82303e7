"""Groups the commands of `reef`. Each imports its dependencies when it runs."""

import click

from reef import __version__
from reef.adapters import delete, list_, restore, retire
from reef.alias import alias
from reef.audit import audit
from reef.bench import bench
from reef.completion import completion
from reef.config_keys import config_keys
from reef.demo import check
from reef.describe import describe
from reef.gc import gc
from reef.keys import new_key
from reef.plan import plan
from reef.profile import profile
from reef.prove import prove
from reef.publish import publish
from reef.serve import serve
from reef.simulate import simulate
from reef.store_keys import keys
from reef.tune import tune
from reef.usage import usage
from reef.verify import verify


@click.group(name="reef", context_settings={"max_content_width": 100})
@click.version_option(__version__, message="%(prog)s %(version)s")
def reef() -> None:
    """Serve LoRA adapters of one base model, and manage the store that they come from."""


for command in (serve, publish, list_, describe, alias, retire, restore, delete):
    reef.add_command(command)
for command in (prove, verify, gc, audit, usage):
    reef.add_command(command)
for command in (
    new_key,
    keys,
    config_keys,
    plan,
    profile,
    simulate,
    tune,
    check,
    bench,
    completion,
):
    reef.add_command(command)
