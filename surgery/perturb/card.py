"""README.md of a perturbed checkpoint, the Hub's model card: source, settings, how to verify, repeat and load.

It is written once; what its owner then writes in it stays. Nothing in it depends on the time, the machine or this
package's version number, so the same run writes the same card.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard_data import ModelCardData  # huggingface_hub.repocard takes 0.1 s to import

from surgery.checkpoint.digests import algorithm_of
from surgery.checkpoint.layout import PLACE
from surgery.escapes import get_logger, printable, shell_quote
from surgery.perturb.front_matter import Text, read_fields
from surgery.perturb.loading import Loading, find_loading
from surgery.perturb.plan import perturb_command
from surgery.recipe import Recipe

_log = get_logger(__name__)

_INHERITED = ("library_name", "license", "license_name", "license_link", "pipeline_tag")


def make_card(recipe: Recipe, inherited: Mapping[str, Any], out: Path) -> str:
    """Return the text of the card.

    Args:
        recipe: of the checkpoint that the card describes.
        inherited: what `read_metadata` found in the source's card.
        out: the folder that holds its companions.
    """
    loading = find_loading(recipe, out, inherited.get("library_name"))
    metadata = ModelCardData(
        **{"library_name": loading.library, **inherited},
        base_model=recipe.source if recipe.commit else None,
        base_model_relation="finetune" if recipe.commit else None,
        tags=["noisytune", "model-surgery"],
    )
    parts = [f"---\n{metadata.to_yaml()}\n---", _title(recipe), _done(recipe), _repeat(recipe), _load(loading)]
    return "\n\n".join(parts) + "\n"


def read_metadata(card: Path) -> dict[str, Any]:
    """Return what holds for the perturbed checkpoint too of a card's metadata; a damaged card has none.

    There may be several licences; several of anything else are not taken over.
    """
    try:
        found = read_fields(card, _INHERITED).items()
        return {name: _plain(value) for name, value in found if isinstance(value, str) or name == "license"}
    except (ValueError, yaml.YAMLError):
        _log.warning("%s: its metadata is damaged, so its licence and task are not in the new card", card)
        return {}


def _plain(value: Text) -> Text:
    return printable(value) if isinstance(value, str) else [printable(text) for text in value]


def _name(recipe: Recipe) -> str:
    """Name the source: a folder or file of this machine without where it was."""
    return recipe.source if recipe.commit else Path(recipe.source).name


def _title(recipe: Recipe) -> str:
    name = printable(_name(recipe))
    settings = recipe.settings
    link = f"[{name}](https://huggingface.co/{name}/tree/{recipe.commit})" if recipe.commit else f"`{name}`"
    return (
        f"# {name.rpartition('/')[2]} with NoisyTune's noise, lam {settings.lam:g}, seed {settings.seed}\n\n"
        f"The weights of {link}, with a little noise added to each matrix. Nothing was trained. "
        "[NoisyTune](https://arxiv.org/abs/2202.12024) (Wu et al., ACL 2022) finds that models fine-tune better from "
        "such weights."
    )


def _done(recipe: Recipe) -> str:
    s = recipe.settings
    perturbed = sum(tensor.copied is None for tensor in recipe.tensors)
    noise = "U(-lam/2, lam/2)" if s.noise == "uniform" else "N(0, lam^2/12)"
    spread = "std(w)" if s.scale == "matrix" else "std(all perturbed weights)"
    facts = {
        "source": f"`{_name(recipe)}{'@' * bool(recipe.commit)}{recipe.commit or ''}`",
        "variant": recipe.variant and f"`{recipe.variant}`",
        "key": recipe.key and f"`{recipe.key}`",
        "dequantized to": recipe.dequantize,
        "formula": f"`w' = w + {noise} * {spread}`",
        "lam": f"{s.lam:g}",
        "seed": str(s.seed),
        "noise": s.noise,
        "scale": s.scale,
        "rounding": s.rounding,
        "include": ", ".join(f"`{glob}`" for glob in s.include),
        "exclude": ", ".join(f"`{glob}`" for glob in s.exclude),
        "tensors": f"{perturbed} perturbed, {len(recipe.tensors) - perturbed} copied",
    }
    listed = "\n".join(f"- {label}: {printable(value)}" for label, value in facts.items() if value)
    return (
        f"## What was done\n\n{listed}\n\n"
        "`surgery.json` has the rest: every tensor's standard deviation, why some were copied, every file's "
        f"{algorithm_of(recipe.files[0].digest)}."
    )


def _repeat(recipe: Recipe) -> str:
    where = "" if recipe.commit else f" --source {shell_quote(_name(recipe))}"
    note = "" if recipe.commit else f"# --source: where {printable(_name(recipe))} is on your machine\n"
    again = perturb_command(
        _name(recipe),
        recipe.settings,
        commit=recipe.commit,
        variant=recipe.variant,
        key=recipe.key,
        dequantize=recipe.dequantize,
    )
    return (
        "## Verify and repeat\n\n"
        "With the command of model-surgery:\n\n"
        "```sh\n"
        f"REPO={PLACE}  # this repository's id, or the folder that holds it\n"
        f"{note}"
        f'surgery verify "$REPO"{where}  # recompute every tensor, and compare it bit for bit\n'
        f'surgery materialize "$REPO"{where} -o again  # write the same bytes, from the source and surgery.json alone\n'
        f"{again}  # do the same to the source\n"
        "```"
    )


def _load(loading: Loading) -> str:
    return (
        f"## Load\n\n```python\n{loading.for_repository()}\n```\n\n"
        "If this repository holds only the recipe and no weights, `surgery materialize` writes them."
    )
