"""`surgery env`: print the environment variables that do what `surgery run` does, for launchers of clusters."""

import os
from functools import partial
from typing import Any

import click

from surgery.cli.group import command, main
from surgery.cli.run_options import RegularizerCommand, read_options
from surgery.exit_codes import USAGE


@main.command(cls=RegularizerCommand)
@partial(command, code=USAGE)
def env(*, as_json: bool, **flags: Any) -> None:
    """Print the variables that regularize what is trained where they are set.

    For the launcher of a cluster: eval "$(surgery env --mixout 0.7)". Every process then prints what became of it.
    """
    from surgery.hooks.run.launch import SITE, environment_of

    options = read_options(flags)
    if as_json:
        from surgery.report.text import as_json as to_json

        path = environment_of(options, os.environ)["PYTHONPATH"]
        click.echo(to_json({"PYTHONPATH": path} | options.variables))
        return
    from shlex import quote

    click.echo(f'export PYTHONPATH={quote(str(SITE))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    click.echo(" ".join(["export", *(f"{name}={quote(value)}" for name, value in options.variables.items())]))
