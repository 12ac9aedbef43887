"""Whether an output folder that is not empty may be written to: by the run that it is of, or to be replaced."""

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from surgery.errors import OutputError
from surgery.storage.url import Url


def refuse_others_files(
    place: object,
    present: Collection[str],
    strangers: Collection[str],
    *,
    journal: Mapping[str, Any],
    recipe: Mapping[str, Any] | None,
    job: Mapping[str, Any],
    resume: str,
    overwrite: bool,
) -> None:
    """Refuse a folder that holds what no run of ours wrote, or what another run did.

    Args:
        place: the folder.
        present: the files in it.
        strangers: those of them that no run of ours wrote.
        journal: of an unfinished run, or empty.
        recipe: of a finished one.
        job, resume: of the run that is to write there.
    Raises:
        OutputError: it does.
    """
    if journal and journal.get("job") != job and not overwrite:
        _refuse_other_job(place, journal, resume)
    if strangers or (present and not journal and not (recipe and overwrite)):
        found = f"{len(strangers or present)} files, such as {sorted(strangers or present)[0]!r}"
        hint = "Choose another with `out`." if strangers or not recipe else "Replace it with `overwrite`, or use `out`."
        raise OutputError(f"{place}: expected a new or empty folder, got {found}. {hint}")


def _refuse_other_job(place: object, journal: Mapping[str, Any], resume: str) -> NoReturn:
    if journal.get("resume") == resume:
        raise OutputError(
            f"{place}: expected the source as it was when this run began, got one that has changed since. "
            "Start again with `overwrite`."
        )
    raise OutputError(
        f"{place}: expected a new or empty folder, got one that another command did not finish. "
        f"Finish it with `{journal.get('resume')}`, or replace it with `overwrite`."
    )


def edited_card(card: object) -> OutputError:
    """Return the error of a card that its owner has written in: what else is removed can be made again."""
    return OutputError(f"{card}: expected the card that was written here, got one edited since. Move it away first.")


def refuse_url(out: Url, source: Url | None) -> None:
    """Refuse an output folder that is the source, is inside it, or holds it.

    Raises:
        OutputError: any of these.
    """
    if source is None:
        return
    if source.holds(out):
        raise OutputError(
            f"{out}: expected a folder outside the source, got one inside {source}. Choose another with `out`."
        )
    if out.holds(source):  # --overwrite would remove it
        raise OutputError(
            f"{out}: expected a folder outside the source, got one that holds it. Choose another with `out`."
        )
