"""The options that several commands share, as decorators, each written once.

Where only the help differs from command to command, the option is a function of it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from surgery.engines import ENGINES
from surgery.errors import SettingError

if TYPE_CHECKING:
    from surgery.perturb.parts import Part

_SEED = "{seed}"
_MOST_SEEDS = 1000
_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Seeds(click.ParamType):  # type: ignore[type-arg]
    """One seed, or a range such as 0..9, both ends included."""

    name = "seeds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> range:
        if isinstance(value, range):
            return value
        first, dots, last = str(value).partition("..")
        try:
            seeds = range(int(first), int(last if dots else first) + 1)
        except ValueError:
            seeds = range(0)
        if not 0 < seeds.stop - seeds.start <= _MOST_SEEDS:
            self.fail(f"expected a seed, or a range such as 0..9 of at most {_MOST_SEEDS}, got {value}.", param, ctx)
        return seeds


class _Array(click.ParamType):  # type: ignore[type-arg]
    """One part of several, as I/N."""

    name = "array"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> "Part":
        from surgery.perturb.parts import Part  # not before it is asked for

        index, _, count = str(value).partition("/")
        # more would be no number of machines, and isdecimal knows what int cannot take
        if not (index.isascii() and index.isdecimal() and count.isascii() and count.isdecimal() and len(count) < 8):
            self.fail(f"expected I/N such as 0/4, got {value}.", param, ctx)
        if int(index) >= int(count):
            self.fail(f"expected I/N with I from 0 to N - 1, got {value}.", param, ctx)
        return Part(int(index), int(count))


class _Place(click.ParamType):  # type: ignore[type-arg]
    """A folder as a Path, or a URL as it is: a Path would make one slash of two."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> "Path | str":  # noqa: ARG002
        return value if "://" in str(value) else Path(value)


def complete_path(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Have the shell complete a file or folder; a Hub id is not looked up."""
    return [CompletionItem(incomplete, type="file")]


def complete_folder(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Have the shell complete a folder."""
    return [CompletionItem(incomplete, type="dir")]


debug = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
json = click.option("--json", "as_json", is_flag=True, help="Print the result, or the error, as JSON on stdout.")

revision = click.option("--revision", help="Branch, tag or commit on the Hub.")
source = click.option(
    "--source",
    shell_complete=complete_path,
    help="Where the source is now: Hub id, folder, file or URL.  [default: where it was]",
)
token = click.option("--token", help="Hub token.  [default: the one of `hf auth login`]")

out = click.option(
    "-o",
    "--out",
    shell_complete=complete_folder,
    type=_Place(),
    help="Folder or URL to write.  [default: MODEL-noisytune-lam…-seed…]",
)
overwrite = click.option("--overwrite", is_flag=True, help="Replace what a former run wrote to the folder.")


def seed(help: str, **settings: Any) -> _Decorator:
    """Add --seed, of which there may be several."""
    return click.option("--seed", "seeds", type=_Seeds(), metavar="N|A..B", help=help, **settings)


seeds = click.option("--seeds", type=_Seeds(), metavar="N|A..B", help="How many, from 0, or which.")


def fill_in(value: Any, option: str, seeds: range, seed: int | None) -> Any:
    """Put a seed where an option's value says {seed}.

    Raises:
        SettingError: there are several seeds, and the value would be the same for all of them.
    """
    if value is None or seed is None:
        return value
    text = str(value)
    if len(seeds) > 1 and _SEED not in text:
        raise SettingError(f"{option}: expected {_SEED} in it with several seeds, got {text}. Write {text}-{_SEED}.")
    return type(value)(text.replace(_SEED, str(seed)))


def variant(of: str = "") -> _Decorator:
    """Add --variant. `of` says of which checkpoints, where there are several."""
    return click.option("--variant", help=f"Weights' variant, such as fp16{of}.")


key = click.option("--key", metavar="NAME", help="State_dict to take of a PyTorch file that holds several.")


engine = click.option(
    "--engine",
    type=click.Choice(ENGINES),
    help="Where shards are worked on; --workers is of each task then.  [default: local]",
)
array = click.option(
    "--array", type=_Array(), metavar="I/N", help="Do part I of N, from 0; the last to end completes the folder."
)


def workers(default: str) -> _Decorator:
    """Add --workers. `default` says how many threads that is to a core."""
    return click.option("--workers", type=click.IntRange(min=1), help=f"Threads.  [default: {default}, at most 16]")


def plot(help: str) -> _Decorator:
    """Add --plot."""
    return click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help=f"{help} PNG, PDF or SVG.")


def show_all(help: str) -> _Decorator:
    """Add --all."""
    return click.option("--all", "is_all", is_flag=True, help=help)


def dry_run(help: str) -> _Decorator:
    """Add --dry-run."""
    return click.option("--dry-run", is_flag=True, help=help)


def include(help: str) -> _Decorator:
    """Add --include."""
    return click.option("--include", multiple=True, metavar="GLOB", help=help)


def exclude(help: str) -> _Decorator:
    """Add --exclude."""
    return click.option("--exclude", multiple=True, metavar="GLOB", help=help)


def private(help: str) -> _Decorator:
    """Add --private."""
    return click.option("--private", is_flag=True, help=help)


def create_pr(help: str) -> _Decorator:
    """Add --create-pr."""
    return click.option("--create-pr", is_flag=True, help=help)


def recipe_only(help: str) -> _Decorator:
    """Add --recipe-only."""
    return click.option("--recipe-only", is_flag=True, help=help)


def collection(help: str) -> _Decorator:
    """Add --collection."""
    return click.option("--collection", metavar="TITLE", help=help)


def commit_message(help: str) -> _Decorator:
    """Add --commit-message."""
    return click.option("--commit-message", help=help)
