"""Output folders and journals as versions wrote them whose recipes are surgery-recipe-1: sha256, without saying so."""

import hashlib
import json
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_former(out: Path, source: Path) -> None:
    """Put the recipe and the card of an output folder into the former format."""
    card = out / "README.md"
    card.write_text(card.read_text().replace("every file's blake3.", "every file's sha256."))
    recipe = json.loads((out / "surgery.json").read_bytes()) | {"format": "surgery-recipe-1", "card": sha256(card)}
    recipe["files"] = [
        former_record(file, sha256(out / file["name"]), sha256(source / file["source"])) for file in recipe["files"]
    ]
    recipe["companions"] = {name: sha256(out / name) for name in recipe["companions"]}
    (out / "surgery.json").write_text(json.dumps(recipe, indent=1) + "\n")


def former_record(entry: dict[str, Any], digest: str, source_digest: str) -> dict[str, Any]:
    """Rename the fields of a file's record."""
    new = {"digest": ("sha256", digest), "source_digest": ("source_sha256", source_digest)}
    return dict(new.get(key, (key, value)) for key, value in entry.items())


def make_former_journal(out: Path) -> None:
    """Put an unfinished folder's journal into the former format, with digests that are false."""
    path = out / "surgery.unfinished.json"
    journal = json.loads(path.read_bytes())
    journal["finished"] = {name: former_record(e, "0" * 64, "0" * 64) for name, e in journal["finished"].items()}
    for entry in journal["notes"].get("measured", {}).values():
        del entry["source_digest"]
        entry["source_sha256"] = "0" * 64
    path.write_text(json.dumps(journal, indent=1) + "\n")
