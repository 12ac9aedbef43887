"""What a former run left in an output folder: journal, recipe and card, which may be damaged or an older version's."""

import json
from pathlib import Path
from typing import Any

from surgery.checkpoint.digests import SHA256, algorithm_of, digest_of_bytes, is_digest
from surgery.checkpoint.layout import CARD
from surgery.files import read_file
from surgery.recipe import FORMAT_1


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a journal or a recipe; None if there is none that is JSON."""
    try:
        return parse_json(read_file(path))
    except (FileNotFoundError, IsADirectoryError):
        return None


def parse_json(data: bytes) -> dict[str, Any] | None:
    """Return what is in a journal or a recipe; None if it is damaged."""
    try:
        loaded = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return loaded if isinstance(loaded, dict) else None


def names_in(recipe: dict[str, Any]) -> set[str]:
    """Name the files a finished run wrote; none for a surgery.json that is not ours."""
    try:
        card = {CARD} if recipe.get("card") else set()
        return {str(file["name"]) for file in recipe["files"]} | set(recipe["companions"]) | card
    except (KeyError, TypeError):
        return set()


def is_edited(card: Path, recipe: dict[str, Any]) -> bool:
    """Tell whether a card is there that is not the one that the run wrote."""
    return bool(recipe.get("card")) and card.is_file() and is_other_card(read_file(card), recipe)


def is_other_card(card: bytes, recipe: dict[str, Any]) -> bool:
    """Tell whether a card is not the one that a recipe names; False if it names none."""
    written = recipe.get("card")
    if not written:
        return False
    written = f"{SHA256}:{written}" if recipe.get("format") == FORMAT_1 else written
    return not is_digest(written) or digest_of_bytes(card, algorithm_of(written)) != written
