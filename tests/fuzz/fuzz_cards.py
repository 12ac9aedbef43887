"""Mutated README.md of a source: what the new card takes over of it, against yaml.safe_load."""

import re
from pathlib import Path
from random import Random
from typing import Any

import yaml
from mutations import JSON_TOKENS, mutate_bytes, mutate_json
from outcomes import FindingError

from surgery.escapes import printable
from surgery.noisytune import NoisyTune
from surgery.perturb.card import make_card, read_metadata
from surgery.recipe import FileRecord, Recipe, TensorRecord

_TOKENS = (
    *JSON_TOKENS,
    *(
        b"&a ",
        b"*a",
        b"<<: *a\n",
        b"!!python/object/apply:os.system [x]",
        b"!!str ",
        b"!x ",
        b"? ",
        b"- ",
        b"\n",
        b"\r\n",
    ),
    *(
        b"| \n",
        b">+9\n",
        b"%YAML 1.1\n",
        b"---\n",
        b"\n---\n",
        b"...\n",
        b"#",
        b"'",
        b'"',
        b"\t",
        b"\xe2\x80\xa8",
        b"\x85",
    ),
    *(b"2026-01-01", b"1:30", b"0x_", b"-.inf", b"yes", b"{" * 100, b"- " * 100, b"\nlicense: ", b"\nlibrary_name: "),
)
_DOCUMENTS: tuple[dict[str, Any], ...] = (
    {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": ["a", "b"],
        "language": "en",
    },
    {"license": ["mit", "other"], "license_name": "tiny-1", "license_link": "https://a.b/c#d", "library_name": "peft"},
    {"model-index": [{"name": "x", "results": [{"value": 0.5, "task": {"type": "t"}}]}], "license": "apache-2.0"},
    {"library_name": "diffusers", "license_name": "Ünïcode: 日本 'x' \"y\"", "pipeline_tag": "a\nb\n", "widget": []},
)
_TENSOR = TensorRecord("w", "F32", (2, 2), 1.0, None)
_DIGEST = "blake3:" + "0" * 64
_FILE = FileRecord("model.safetensors", _DIGEST, "model.safetensors", _DIGEST, (_TENSOR,))
_RECIPE = Recipe("org/x", "c" * 40, NoisyTune(), (_FILE,))
_FIELDS = ("library_name", "license", "license_name", "license_link", "pipeline_tag")


def _mutated_card(r: Random) -> bytes:
    document = r.choice(_DOCUMENTS)
    document = mutate_json(r, document) if r.random() < 0.5 else document
    try:
        text = yaml.safe_dump(
            document, allow_unicode=r.random() < 0.5, default_flow_style=r.choice((True, False, None))
        )
    except (yaml.YAMLError, ValueError):  # of what a mutated document holds
        text = yaml.safe_dump(r.choice(_DOCUMENTS))
    card = b"---\n" + text.encode("utf-8", "surrogatepass") + b"---\n# x\n"
    if r.random() < 0.1:
        card = card.replace(b"\n", b"\r\n")
    return mutate_bytes(r, card, _TOKENS) if r.random() < 0.8 else card


def _escaped(value: Any) -> Any:
    """Return a field as the new card has it: nothing that a terminal would act on."""
    if isinstance(value, list):
        return [_escaped(part) for part in value]
    return printable(value) if isinstance(value, str) else value


class Cards:
    def __init__(self, folder: Path) -> None:
        self._path = folder / "README.md"

    def write(self, r: Random) -> None:
        self._path.write_bytes(_mutated_card(r))

    def read(self) -> tuple[dict[str, Any], str]:
        found = read_metadata(self._path)
        return found, make_card(_RECIPE, found, Path())

    def judge(self, ours: Any) -> str:
        found, card = ours
        card.encode()
        written = yaml.safe_load(card.removeprefix("---\n").partition("\n---\n")[0])
        if {name: written.get(name) for name in found} != found:
            raise FindingError(f"wrote {written!r:.300} of {found!r:.300}")
        theirs = self._oracle()
        if theirs is None:
            return "took over nothing: damaged" if not found else "took over some of a card that its oracle refuses"
        if wrong := [name for name in found if found[name] != _escaped(theirs.get(name))]:
            raise FindingError(f"{wrong[0]}: {found[wrong[0]]!r:.100} for {theirs.get(wrong[0])!r:.100}")
        is_all = all(_escaped(theirs.get(name)) == found.get(name) for name in _FIELDS)
        return f"took over {'all' if is_all else 'some'} fields"

    def _oracle(self) -> dict[Any, Any] | None:
        front = re.match(
            rb"(?:\xef\xbb\xbf)?\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", self._path.read_bytes(), re.DOTALL
        )
        try:
            loaded = yaml.safe_load(front[1]) if front else {}
        except (yaml.YAMLError, ValueError, TypeError, RecursionError, AttributeError):
            return None
        return loaded if isinstance(loaded, dict) else None
