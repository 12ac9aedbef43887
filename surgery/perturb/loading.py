"""How to load a checkpoint that was written: the model card and `next:` of the report both take it from here.

The files tell the library, by the rules of the libraries themselves. A class is named only where it is a known one, so
that no word of a config becomes code; what cannot be known is loaded with load_file.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.layout import CARD, PLACE
from surgery.checkpoint.model_types import find_class
from surgery.files import read_file
from surgery.perturb.front_matter import read_library
from surgery.recipe import Recipe

_SENTENCES = ("SentenceTransformer", "SparseEncoder", "CrossEncoder", "MultiVectorEncoder")
_PEFT_TASKS = {
    None: "",
    "CAUSAL_LM": "ForCausalLM",
    "FEATURE_EXTRACTION": "ForFeatureExtraction",
    "QUESTION_ANS": "ForQuestionAnswering",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
}
"""Which AutoPeftModel takes a task_type: each refuses those of the others."""
_STEMS = {"transformers": "model", "diffusers": "diffusion_pytorch_model"}
_OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"  # the only ones that it takes from the Hub and from a folder
_EITHER = "this repository's id, or the folder that holds it"
_BY_FILE = 'sorted(folder.rglob("*.safetensors"))'


@dataclass(frozen=True)
class Loading:
    """The code that loads a checkpoint as a model; load_file's, as tensors, without a library.

    Args:
        library: in the Hub's spelling.
        imports: lines of code.
        call: an expression, with %s for where the checkpoint is; of tensors, one that begins at `folder`, a Path.
        schemes: what to put before a Hub id, and before a folder.
    """

    library: str | None
    imports: str
    call: str
    schemes: tuple[str, str] = ("", "")

    def for_repository(self) -> str:
        """Return the lines of a card, which say ORG/NAME for the repository's id."""
        on_hub, on_disk = self.schemes
        if self.library is None:
            imports = f"from pathlib import Path\n\nfrom huggingface_hub import snapshot_download\n{self.imports}"
            where = f'folder = Path(snapshot_download("{PLACE}"))  # or Path of the folder that holds this repository'
            return f"{imports}\n\n{where}\ntensors = {self.call}"
        note = (
            f'"{on_hub}" and this repository\'s id, or "{on_disk}" and the folder that holds it' if on_hub else _EITHER
        )
        call = self.call % f'"{on_hub}{PLACE}"'
        return f"{self.imports}\n\nmodel = {call}  # {note}"

    def for_folder(self, folder: Path) -> str:
        """Return one line that prints what a folder holds: the model, or the names of tensors."""
        imports = self.imports.replace("\n", "; ")
        if self.library is None:
            place = f"folder = Path({str(folder)!r})"
            return f"from pathlib import Path; {imports}; {place}; print(*{self.call}, sep='\\n')"
        return f"{imports}; print({self.call % repr(self.schemes[1] + str(folder))})"


def find_loading(recipe: Recipe, out: Path, library: str | None = None) -> Loading:
    """Return how to load what a recipe describes and `out` holds, at least its companions.

    Args:
        library: what the source's card says loads it. One that is not known here may do what the files do not tell.
    """
    files = _Files(recipe, out)
    if library is not None:
        if library not in _FINDERS:
            return _as_tensors(recipe)
        if found := _FINDERS[library](files):
            return found
    return next((found for find in _FINDERS.values() if (found := find(files))), _as_tensors(recipe))


def find_own_loading(recipe: Recipe, out: Path) -> Loading:
    """Return how to load a finished folder, whose card has the library."""
    return find_loading(recipe, out, read_library(out / CARD))


@dataclass(frozen=True)
class _Files:
    """The files of a checkpoint, of which only those are read that its recipe names."""

    recipe: Recipe
    out: Path

    def read(self, name: str) -> Any:
        """Return the JSON of a companion; None if there is none."""
        try:
            return json.loads(read_file(self.out / name)) if name in self.recipe.companions else None
        except (FileNotFoundError, ValueError, RecursionError):
            return None

    def read_config(self, name: str) -> Mapping[str, Any]:
        """Return a companion's JSON object, empty if it is none."""
        found = self.read(name)
        return found if isinstance(found, dict) else {}

    def holds(self, stem: str) -> bool:
        """Tell whether from_pretrained finds its weights at the top, by the name of a file or of an index."""
        names = [*(file.name for file in self.recipe.files), *self.recipe.companions]
        return any(re.fullmatch(rf"{stem}[.-][^/]*safetensors(\.index\S*\.json)?", name) for name in names)

    def is_file(self, name: str) -> bool:
        """Tell whether weights are in a file of this very name."""
        return any(file.name == name for file in self.recipe.files)

    @property
    def variant(self) -> str:
        """The argument that chooses the variant."""
        return f', variant="{self.recipe.variant}"' if self.recipe.variant else ""


def _sentence_transformers(files: _Files) -> Loading | None:
    modules = files.read("modules.json")
    listed = modules if isinstance(modules, list) else []
    kinds = [str(module.get("type")) if isinstance(module, dict) else "" for module in listed]
    if not kinds or not all(kind.startswith("sentence_transformers.") for kind in kinds):
        return None  # modules of one's own, which are code in the repository
    name = files.read_config("config_sentence_transformers.json").get("model_type", _SENTENCES[0])
    if name not in _SENTENCES:
        return None
    variant = files.recipe.variant
    kwargs = f', model_kwargs={{"variant": "{variant}"}}' if variant else ""
    return Loading("sentence-transformers", f"from sentence_transformers import {name}", f"{name}(%s{kwargs})")


def _pipeline(files: _Files) -> Loading | None:
    if not files.read_config("model_index.json"):
        return None
    return _from_pretrained("diffusers", "DiffusionPipeline", files.variant)


def _peft(files: _Files) -> Loading | None:
    config = files.read_config("adapter_config.json")
    task = config.get("task_type")
    is_usable = config.get("base_model_name_or_path") and (task or config.get("auto_mapping"))
    if not is_usable or task not in list(_PEFT_TASKS) or not files.is_file("adapter_model.safetensors"):
        return None
    return _from_pretrained("peft", f"AutoPeftModel{_PEFT_TASKS[task]}")


def _timm(files: _Files) -> Loading | None:
    config = files.read_config("config.json")
    is_timm = isinstance(config.get("architecture"), str) and isinstance(config.get("pretrained_cfg"), dict)
    if not is_timm or not files.is_file("model.safetensors"):
        return None
    return Loading("timm", "import timm", "timm.create_model(%s, pretrained=True)", ("hf-hub:", "local-dir:"))


def _open_clip(files: _Files) -> Loading | None:
    if "model_cfg" not in files.read_config("open_clip_config.json") or not files.is_file(_OPEN_CLIP_WEIGHTS):
        return None
    return Loading("open_clip", "import open_clip", "open_clip.create_model(%s)", ("hf-hub:", "local-dir:"))


def _class_of(library: str) -> Callable[[_Files], Loading | None]:
    def find(files: _Files) -> Loading | None:
        found = find_class(files.read_config("config.json"))
        if found is None or found[0] != library or not files.holds(_STEMS[library]):
            return None
        return _from_pretrained(library, found[1], files.variant)

    return find


def _diffusers(files: _Files) -> Loading | None:
    return _pipeline(files) or _class_of("diffusers")(files)


_FINDERS: Mapping[str, Callable[[_Files], Loading | None]] = {
    "sentence-transformers": _sentence_transformers,
    "diffusers": _diffusers,
    "peft": _peft,
    "timm": _timm,
    "transformers": _class_of("transformers"),
    "open_clip": _open_clip,
}
"""How each library tells that a checkpoint is one of its own; the first that does is taken."""


def _from_pretrained(library: str, name: str, arguments: str = "") -> Loading:
    return Loading(library, f"from {library} import {name}", f"{name}.from_pretrained(%s{arguments})")


def _as_tensors(recipe: Recipe) -> Loading:
    """Return one dict of tensors, or where two files hold one of the same name, a dict for each file."""
    imports = "from safetensors.torch import load_file"
    names = [tensor.name for tensor in recipe.tensors]
    if len(recipe.files) == 1:
        return Loading(None, imports, f"load_file(folder / {recipe.files[0].name!r})")
    if len(set(names)) == len(names):
        return Loading(None, imports, f"{{k: w for file in {_BY_FILE} for k, w in load_file(file).items()}}")
    return Loading(None, imports, f"{{str(file.relative_to(folder)): load_file(file) for file in {_BY_FILE}}}")
