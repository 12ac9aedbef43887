"""The user's command with {seed} and {out} in it, and the variables of --env: what each trial fills in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from surgery.errors import SettingError

SEED, OUT = "{seed}", "{out}"


@dataclass(frozen=True)
class Template:
    """A command to be filled in. All other braces in it stay as they are.

    Args:
        words: its arguments, the first the program.
        variables: of the environment.
    """

    words: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)

    def fill(self, seed: int, out: Path) -> "Template":
        """Return it for one trial."""
        return Template(
            tuple(_fill(word, seed, out) for word in self.words),
            {name: _fill(value, seed, out) for name, value in self.variables.items()},
        )

    @property
    def has_out(self) -> bool:
        """Whether the command is told of the trial's folder."""
        return any(OUT in text for text in (*self.words, *self.variables.values()))


def make_template(command: Sequence[str], variables: Sequence[str]) -> Template:
    """Make a template of a command and of NAME=VALUE strings.

    Raises:
        SettingError: there is no command, no {seed} in it, or no name.
    """
    if not command:
        raise SettingError(
            "command: expected one, got none. Write it after --, such as: surgery study -o study --seeds 20 "
            "--metric eval_accuracy --arm mixout=0.7 -- python train.py --seed {seed} --output_dir {out}."
        )
    found: dict[str, str] = {}
    for text in variables:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise SettingError(f"--env: expected NAME=VALUE, got {text!r}. Correct it.")
        found[name] = value
    template = Template(tuple(command), found)
    if not any(SEED in text for text in (*template.words, *found.values())):
        raise SettingError(
            "command: expected {seed} where the script takes its seed, got none. Write it there, such as --seed "
            "{seed}, or in a variable, such as --env SEED={seed}."
        )
    return template


def _fill(text: str, seed: int, out: Path) -> str:
    return text.replace(SEED, str(seed)).replace(OUT, str(out))
