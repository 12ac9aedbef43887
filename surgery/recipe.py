"""surgery.json, the recipe: settings, and a record of every file and tensor, enough to do the run again bit for bit."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from surgery.checkpoint.digests import SHA256, hex_of, is_digest
from surgery.display import Brief, as_html, as_shape, at_commit, number
from surgery.errors import SettingError, SourceError, by_reason, some
from surgery.escapes import get_logger
from surgery.files import read_file
from surgery.json_values import all_typed, as_float, from_hex, optional, texts, to_hex, typed
from surgery.noise import CONTRACT
from surgery.noisytune import Effect, NoisyTune
from surgery.roles import Role, role_of_reason

FORMAT = "surgery-recipe-2"
FORMAT_1 = "surgery-recipe-1"
"""Its digests are bare sha256."""
PERTURBED = "the source has noise already: it holds a surgery.json"
"""A note on a run."""
_VANISHED = 0.01
_log = get_logger(__name__)
_FILE_FIELDS = ("name", "digest", "source", "source_digest", "tied")
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True, repr=False)
class TensorRecord(Brief):
    """What was done to one tensor.

    Args:
        dtype: in safetensors' names.
        std: of the source tensor, float64; None where it was not measured.
        copied: why the tensor is unchanged, or None if it was perturbed.
        effect: what the noise did to it, None if copied.
        known: how it was known to be a parameter or a buffer: by "class", "rule" or "name"; None in an old recipe.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    std: float | None
    copied: str | None
    effect: Effect | None = None
    known: str | None = None

    @property
    def role(self) -> Role:
        """What the tensor was taken for."""
        return role_of_reason(self.copied, self.known)

    def to_json(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}
        entry["perturbed"] = self.copied is None
        effect = asdict(self.effect) if self.effect else {}
        others = {"why": self.copied, "known": self.known, "std": to_hex(self.std), **effect}
        return entry | {key: value for key, value in others.items() if value is not None}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "TensorRecord":
        figures = ("noise_over_std", "survived")
        effect = Effect(*(as_float(entry[name]) for name in figures)) if "survived" in entry else None
        why = None if entry["perturbed"] else typed(entry["why"], str)
        name, dtype = typed(entry["name"], str), typed(entry["dtype"], str)
        known = optional(entry.get("known"), str)
        return cls(name, dtype, all_typed(entry["shape"], int), from_hex(entry.get("std")), why, effect, known)


@dataclass(frozen=True, repr=False)
class FileRecord(Brief):
    """One weight file: its name, digests, and tensors in the order of their bytes.

    Args:
        name: relative to the output folder; empty for a live model, as source and digests are.
        digest: "blake3:" or "sha256:", and 64 hexadecimal digits.
        source: the file it was made from, relative to the source.
        tied: names that repeat another tensor, whose noise they share, and that tensor's name. Those of a pickle are
            not written again.
        source_version: what the store calls the object that it was made from, such as its ETag; None of a file.
    """

    name: str
    digest: str
    source: str
    source_digest: str
    tensors: tuple[TensorRecord, ...]
    tied: dict[str, str] = field(default_factory=dict)
    source_version: str | None = None

    def to_json(self) -> dict[str, Any]:
        tensors = [tensor.to_json() for tensor in self.tensors]
        version = {"source_version": self.source_version} if self.source_version else {}
        return {name: getattr(self, name) for name in _FILE_FIELDS} | version | {"tensors": tensors}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "FileRecord":
        tensors = tuple(TensorRecord.from_json(tensor) for tensor in typed(entry["tensors"], list))
        name, source, tied = typed(entry["name"], str), typed(entry["source"], str), texts(entry["tied"])
        digest, source_digest = (_digest(entry[key]) if name else "" for key in ("digest", "source_digest"))
        version = optional(entry.get("source_version"), str)
        return cls(name, digest, source, source_digest, tensors, tied, version)

    @classmethod
    def from_journal(cls, entry: Any) -> "FileRecord | None":
        """Return the record that a journal keeps; None if it is none, such as one of an older version."""
        try:
            return cls.from_json(entry)
        except _DAMAGE:
            return None


@dataclass(frozen=True, repr=False)
class Recipe(Brief):
    """What one run of NoisyTune did.

    Args:
        source: Hub id, absolute path or URL of a checkpoint, or the class of a live model.
        commit: Hub commit sha; None for a local checkpoint, which its files' source_digest identify.
        key: which state_dict was taken of PyTorch files that hold several; None in an old recipe.
        dequantize: "bf16" if float8 and mxfp4 weights were read as bfloat16.
        settings: what was asked for.
        pooled_std: the one std of scale="global", else None.
        files: the weight files; for a live model, one record without file names.
        companions: digest of every other file but the card, by name.
        card: digest of README.md as it was written; it is its owner's to edit. None for a live model.
        left_out: files of the source that were not copied, with the reason.
        notes: what else to know, in sentences, such as tensors of a live model that the checkpoint does not name.
        sha256: what the Hub knows files by, in hexadecimal digits by name, of weights and companions that were pushed;
            empty where nothing was. It says nothing of the run, so two recipes may differ in it and be equal.
    """

    source: str
    commit: str | None
    settings: NoisyTune
    files: tuple[FileRecord, ...]
    pooled_std: float | None = None
    variant: str | None = None
    key: str | None = None
    companions: dict[str, str] = field(default_factory=dict)
    card: str | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    contract: str = CONTRACT
    sha256: dict[str, str] = field(default_factory=dict, compare=False)
    dequantize: str | None = None

    @property
    def tensors(self) -> tuple[TensorRecord, ...]:
        return tuple(tensor for file in self.files for tensor in file.tensors)

    @property
    def digests(self) -> dict[str, str]:
        """Digest of every file but card and recipe, by name."""
        return {file.name: file.digest for file in self.files} | self.companions

    @property
    def source_digests(self) -> dict[str, str]:
        """Digest of every weight file of the source, by name."""
        return {file.source: file.source_digest for file in self.files}

    @property
    def vanished(self) -> list[str]:
        """Names of the tensors that were perturbed and kept less than 1 % of their noise after rounding."""
        return [t.name for t in self.tensors if t.effect and t.effect.survived < _VANISHED]

    def _repr_html_(self) -> str:
        copied = [(tensor.name, tensor.copied) for tensor in self.tensors if tensor.copied is not None]
        lines = [
            f"NoisyTune of {at_commit(self.source, self.commit)}",
            ", ".join(f"{name} {value}" for name, value in asdict(self.settings).items() if value != ()),
            f"{len(self.tensors) - len(copied):,} of {len(self.tensors):,} tensors perturbed",
            *(f"copied: {len(names):,} ({some(names)}): {why}" for why, names in by_reason(copied).items()),
            *self.notes,
        ]
        return as_html(lines, _COLUMNS, self.tensors, _cells)

    def to_json(self) -> str:
        """Return the text of surgery.json. Each std is a hexadecimal float."""
        chosen = {"key": self.key, "dequantize": self.dequantize}
        source = {"id": self.source, "commit": self.commit, "variant": self.variant}
        document = {
            "format": FORMAT,
            "contract": self.contract,
            "source": source | {name: value for name, value in chosen.items() if value is not None},
            "settings": asdict(self.settings),
            "pooled_std": to_hex(self.pooled_std),
            "files": [file.to_json() for file in self.files],
            "companions": self.companions,
            "card": self.card,
            "left_out": self.left_out,
            "notes": list(self.notes),
        }
        document |= {"sha256": self.sha256} if self.sha256 else {}
        return json.dumps(document, indent=1) + "\n"  # ASCII: a path need not be UTF-8

    @classmethod
    def from_json(cls, text: str, *, what: str = "surgery.json") -> "Recipe":
        """Read a recipe, also one of the former format.

        Raises:
            SourceError: not a recipe, one of a newer version, or one that names files out of its folder.
        """
        try:
            document = json.loads(text)
            if document["format"] not in (FORMAT, FORMAT_1) or document["contract"] != CONTRACT:
                found = f"{document['format']} of {document['contract']}"
                raise SourceError(f"{what}: expected {FORMAT} of {CONTRACT}, got {found}. Update model-surgery.")
            document = _from_format_1(document) if document["format"] == FORMAT_1 else document
            source = document["source"]
            recipe = cls(
                source=typed(source["id"], str),
                commit=optional(source["commit"], str),
                variant=optional(source["variant"], str),
                key=optional(source.get("key"), str),
                dequantize=optional(source.get("dequantize"), str),
                settings=_settings(document["settings"]),
                pooled_std=from_hex(document["pooled_std"]),
                files=tuple(FileRecord.from_json(file) for file in typed(document["files"], list)),
                companions={name: _digest(digest) for name, digest in typed(document["companions"], dict).items()},
                card=None if document.get("card") is None else _digest(document["card"]),
                left_out=texts(document["left_out"]),
                notes=all_typed(document.get("notes", []), str),
                contract=document["contract"],
                sha256={name: _sha256(digits) for name, digits in typed(document.get("sha256", {}), dict).items()},
            )
        except SettingError as error:
            raise SourceError(f"{what}: {error}") from error
        except _DAMAGE as error:
            raise SourceError(f"{what}: expected a recipe, got another or a damaged file. Fetch it again.") from error
        for name in [name for file in recipe.files for name in (file.name, file.source)] + list(recipe.companions):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or any(character in name for character in "\\\0"):
                raise SourceError(f"{what}: expected files of its own folder, got {name!r}. Do not trust this recipe.")
        return recipe

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        # bytes that are no UTF-8 make it no recipe, not an error of their own
        return cls.from_json(read_file(path).decode(errors="replace"), what=str(path))


_COLUMNS = ("tensor", "dtype", "shape", "std", "noise / std", "survived", "")


def _cells(record: TensorRecord) -> list[str]:
    effect = record.effect
    noise = [number(effect.noise_over_std), f"{effect.survived:.2%}"] if effect else ["", ""]
    why = f"copied: {record.copied}" if record.copied else "perturbed"
    return [record.name, record.dtype.lower(), as_shape(record.shape), number(record.std), *noise, why]


def warn_of_vanished(recipe: Recipe) -> None:
    """Log a warning if rounding took the noise away: a recipe is easily thrown away unread."""
    if names := recipe.vanished:
        _log.warning("noise lost in rounding in %d tensors, such as %s: raise lam", len(names), names[0])


def _from_format_1(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document of format 1 as one of today's."""

    def digest(digits: Any) -> str:
        return f"{SHA256}:{typed(digits, str)}"

    files = [
        file | {"digest": digest(file["sha256"]), "source_digest": digest(file["source_sha256"])}
        for file in typed(document["files"], list)
    ]
    companions = {name: digest(digits) for name, digits in typed(document["companions"], dict).items()}
    card = document.get("card")
    return document | {"files": files, "companions": companions, "card": None if card is None else digest(card)}


def _settings(entry: dict[str, Any]) -> NoisyTune:
    if entry.keys() != {field.name for field in fields(NoisyTune)}:  # a default would take the place of what is gone
        raise KeyError
    globs = {name: all_typed(entry[name], str) for name in ("include", "exclude")}
    return NoisyTune(**(entry | globs | {"seed": typed(entry["seed"], int)}))


def _digest(value: Any) -> str:
    if not is_digest(value):
        raise ValueError
    return value


def _sha256(digits: Any) -> str:
    return hex_of(_digest(f"{SHA256}:{typed(digits, str)}"))
