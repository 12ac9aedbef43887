"""`surgery env`: print the environment variables that do what `surgery run` does, for launchers of clusters."""

import os
from functools import partial
from typing import Any

import click

from surgery.cli.group import RUN_CARD, command, main
from surgery.cli.run_options import RegularizerCommand, read_options
from surgery.cli.syntax import echo_json
from surgery.escapes import shell_quote
from surgery.exit_codes import USAGE


@main.command(
    cls=RegularizerCommand,
    examples=('eval "$(surgery env --mixout 0.7)"', "surgery env --rdrop 1.0 --report report.json --json"),
    card=RUN_CARD,
)
@partial(command, code=USAGE)
def env(*, as_json: bool, **flags: Any) -> None:
    """Print the variables that regularize what is trained where they are set.

    For the launcher of a cluster: eval "$(surgery env --mixout 0.7)". Every process then prints what became of it.
    """
    from surgery.hooks.run.launch import SITE, environment_of

    options = read_options(flags)
    if as_json:
        path = environment_of(options, os.environ)["PYTHONPATH"]
        echo_json({"variables": {"PYTHONPATH": path} | options.variables})
        return
    click.echo(f'export PYTHONPATH={shell_quote(str(SITE))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    click.echo(" ".join(["export", *(f"{name}={shell_quote(value)}" for name, value in options.variables.items())]))
