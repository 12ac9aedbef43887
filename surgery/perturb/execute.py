"""perturb_checkpoint: carry out a Plan shard by shard, and complete the folder."""

from collections.abc import Sequence
from pathlib import Path

from surgery.noisytune import NoisyTune, as_globs
from surgery.perturb.complete import complete
from surgery.perturb.crew import LOCAL, open_crew
from surgery.perturb.output import refuse_windows
from surgery.perturb.plan import Plan, make_plan
from surgery.perturb.same_run import already_done, kept_moments, open_output, open_shared
from surgery.perturb.shared import MEASURED
from surgery.perturb.tasks import with_ties
from surgery.recipe import Recipe, warn_of_vanished


def perturb_checkpoint(
    source: str | Path,
    out: str | Path | None = None,
    *,
    lam: float = 0.15,
    seed: int = 0,
    noise: str = "uniform",
    scale: str = "matrix",
    rounding: str = "nearest",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    revision: str | None = None,
    variant: str | None = None,
    key: str | None = None,
    dequantize: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    engine: str = LOCAL,
    recipe_only: bool = False,
) -> Recipe:
    """Write a copy of a checkpoint with NoisyTune's noise in every floating-point parameter.

    The source is only read. `out` becomes a folder that transformers loads as it loads the source, with the same
    shards, names, dtypes and companion files, and `surgery.json`, the recipe. A run that was interrupted is resumed by
    the same call. w' = w + U(-lam/2, lam/2) * std(w): Wu et al., ACL 2022, arXiv 2202.12024, eq. 1.

    Args:
        source: Hub id, folder, URL, or .safetensors or PyTorch file.
        out: folder or URL to write; default: named after source, lam and seed, in the current directory.
        lam, seed, noise, scale, rounding, include, exclude: see NoisyTune.
        revision: branch, tag or commit; Hub only.
        variant: as in from_pretrained, such as "fp16".
        key: which state_dict to take of a PyTorch file that holds several.
        dequantize: "bf16": write float8 in blocks (DeepSeek, Qwen) and mxfp4 (gpt-oss) as bfloat16.
        token: Hub token; default: the one stored on this machine.
        overwrite: replace what a former run wrote to `out`.
        workers: threads; default: three per core, at most 16. The bytes written do not depend on it.
        engine: "local", this process; "ray" or "slurm": tasks of a cluster that sees source and `out`, each with as
            many workers, by default those of one core.
        recipe_only: write all but the weights and their indexes: materialize_checkpoint makes them from the recipe.
    Returns:
        What was done to every tensor.
    Raises:
        SettingError: a setting is out of range, or would do nothing.
        SourceError: the source is missing, malformed, unsafe, quantized, or holds NaN or Inf.
        OutputError: `out` cannot be used, or the disk is full.
    """
    refuse_windows("perturb")
    settings = NoisyTune(lam, seed, noise, scale, rounding, as_globs("include", include), as_globs("exclude", exclude))
    plan = make_plan(
        source,
        out,
        settings,
        revision=revision,
        variant=variant,
        key=key,
        dequantize=dequantize,
        token=token,
        recipe_only=recipe_only,
    )
    recipe = execute(plan, overwrite=overwrite, workers=workers, engine=engine)
    warn_of_vanished(recipe)
    return recipe


def execute(plan: Plan, *, overwrite: bool = False, workers: int | None = None, engine: str = LOCAL) -> Recipe:
    """Do what the plan says, or finish it, and return the recipe that was written. Raises as perturb_checkpoint."""
    if not overwrite and (recipe := already_done(plan)):
        return recipe
    plan = with_ties(plan)
    folder = open_output(plan)
    records = None if engine == LOCAL else open_shared(plan, "engine").shared.records
    with open_crew(engine, plan, records, workers=workers) as crew, folder.claim(overwrite=overwrite):
        measured = kept_moments(plan, folder) or crew.measure()
        if measured.moments and MEASURED not in folder.notes:
            folder.note(MEASURED, measured.entries)
        crew.write([shard for shard in plan.shards if shard.name not in folder.finished], measured, folder)
        return complete(plan, folder, measured.pooled)
