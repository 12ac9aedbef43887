"""How command lines are read and described: an option is given once, help has sections, examples and links."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from surgery import interrupts
from surgery.escapes import printable

_JSON = "surgery.wants_json"


class SurgeryCommand(click.Command):
    """A command of `surgery`.

    Args:
        examples: command lines to try, each of one line.
        card: where the rest is written.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), card: str = "", **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.examples = examples
        self.card = card

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            _, _, given = self.make_parser(ctx).parse_args(list(args))
            self._refuse_repeated(ctx, given)
        return super().parse_args(ctx, args)

    def key_of(self, option: click.Option) -> str:
        """Return what is the same for two options that say the same."""
        return str(option.name)

    def _refuse_repeated(self, ctx: click.Context, given: Sequence[click.Parameter]) -> None:
        """Refuse an option that is given twice and has one value: the last would be taken, without a word."""
        single = [each for each in given if isinstance(each, click.Option) and not (each.multiple or each.is_flag)]
        counts = Counter(map(self.key_of, single))
        for option in single:
            if (count := counts[self.key_of(option)]) > 1:
                flag = " / ".join(option.opts)
                raise click.UsageError(f"{flag}: expected it once, got it {count} times. Give one value.", ctx)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        write_examples(formatter, self.examples)
        write_links(formatter, [self.card])


class SurgeryGroup(click.Group):
    """The group of all commands, by what people want to do; its usage errors are JSON too where that is asked for."""

    command_class = SurgeryCommand

    def __init__(
        self,
        *args: Any,
        sections: dict[str, Sequence[str]],
        examples: Sequence[str],
        links: Sequence[str],
        **attributes: Any,
    ) -> None:
        super().__init__(*args, **attributes)
        self.sections = sections
        self.examples = examples
        self.links = links

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> click.Context:
        is_json = interrupts.wants_json(args)
        with _answering(is_json=is_json):
            context = super().make_context(info_name, args, *rest, **extra)
        context.meta[_JSON] = is_json
        return context

    def invoke(self, ctx: click.Context) -> Any:
        with _answering(is_json=ctx.meta.get(_JSON, False)):
            return super().invoke(ctx)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if (name := " ".join(args[:2])) in self.commands:  # of two words
            return name, self.commands[name], args[2:]
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return [name for names in self.sections.values() for name in names]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        width = max(map(len, self.commands))
        for title, names in self.sections.items():
            limit = formatter.width - 6 - width
            rows = [(name.ljust(width), self.commands[name].get_short_help_str(limit)) for name in names]
            with formatter.section(title):
                formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        write_examples(formatter, self.examples)
        write_links(formatter, ["`surgery COMMAND --help`, for each command", *self.links])


@contextmanager
def _answering(*, is_json: bool) -> Iterator[None]:
    """Print a usage error as JSON too, and escape the user's own words in it."""
    try:
        yield
    except click.ClickException as error:
        error.message = printable(error.message)  # type: ignore[misc]
        if is_json:
            echo_json({"error": error.format_message()})
        raise


def echo_json(rows: dict[str, Any]) -> None:
    """Print the one JSON object of this command."""
    from surgery.report.text import as_json

    text = as_json(rows)
    interrupts.answered()
    click.echo(text)


def echo_report(rows: dict[str, Any], table: Callable[[], str], *, as_json: bool) -> None:
    """Print rows as JSON, or laid out for people."""
    if as_json:
        echo_json(rows)
    else:
        click.echo(table())


def write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    """Write command lines, each to be copied as it stands."""
    if examples:
        with formatter.section("Examples"):
            formatter.write("".join(f"  $ {example}\n" for example in examples))


def write_links(formatter: click.HelpFormatter, links: Sequence[str]) -> None:
    """Write where to read on."""
    if shown := [link for link in links if link]:
        with formatter.section("Learn more"):
            formatter.write("".join(f"  {link}\n" for link in shown))
