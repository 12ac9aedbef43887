"""What a patch does to a model, as data and in words."""

from collections.abc import Sequence
from dataclasses import dataclass

from .settings import Anchor, Mixout, RDrop


@dataclass(frozen=True)
class Description:
    """What is patched, what is not, and why. str() lays it out for people.

    Args:
        mixout, rdrop, anchor: the settings; all None if the model is not patched.
        mixed: names of the weights that the regularizers act on.
        tied: further names of these weights.
        elements: how many elements those weights have; of_elements: how many the model's parameters have.
        left: why each other parameter is left alone, by name.
        uncalled: mixed weights whose layers no forward in training mode has called yet, once there was one.
        replaced, kept: names of the dropout rates set to 0, and of those that stay.
        w_pre: where the pretrained weights come from.
        w_pre_bytes: what they take on this rank, in bytes.
        w_pre_device: where they lie.
        is_w_pre_lost: they have stayed behind a pickle.
        anchored: optimizer steps that the anchor acted in.
        fired: forwards that R-Drop's KL was a part of.
        missed: optimizer steps without R-Drop, after some with it.
        unjoined: names of losses that R-Drop has no formula for, and has left as they are in the second pass.
        unmixed: optimizer steps without Mixout.
        elsewhere: of a model that is not patched itself: what of it, or around it, is.
    """

    mixout: Mixout | None = None
    rdrop: RDrop | None = None
    anchor: Anchor | None = None
    mixed: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    elements: int = 0
    of_elements: int = 0
    left: dict[str, str] | None = None
    uncalled: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    w_pre: str = ""
    w_pre_bytes: int = 0
    w_pre_device: str = ""
    is_w_pre_lost: bool = False
    anchored: int = 0
    fired: int = 0
    missed: int = 0
    unjoined: tuple[str, ...] = ()
    unmixed: int = 0
    elsewhere: str = ""

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(found: Description) -> list[str]:
    if found.mixout is None and found.rdrop is None and found.anchor is None:
        return [f"not patched{found.elsewhere and ' itself, but '}{found.elsewhere}"]
    lines = []
    if found.rdrop is not None:
        lines.append(_rdrop_line(found.rdrop, found.fired))
        if found.missed:
            lines.append(f"NOT IN       {found.missed} {_MISSED}")
        if found.unjoined:
            lines.append(f"not joined   {', '.join(found.unjoined)}: no formula; as the second pass has it")
    if found.mixout is None and found.anchor is None:
        return lines
    if found.mixout is not None:
        m = found.mixout
        lines.append(f"mixout       p = {m.p:g}, one mask value per {_UNIT[m.granularity]}, {m.gradient} gradient")
    if found.unmixed:
        lines.append(f"NOT MIXED    in {found.unmixed} {_MISSED}")
    if found.anchor is not None:
        lines.append(
            f"anchor       weight {found.anchor.weight:g}, in {found.anchored} optimizer steps so far; set the "
            "optimizer's weight_decay for these weights to 0"
        )
    verb = "mixed" if found.mixout is not None else "anchored"
    share = f"{found.elements:,} of {found.of_elements:,} elements"
    lines.append(f"{verb:12} {len(found.mixed)} weights, {share}: {_first(found.mixed) or _NOTHING}")
    if found.tied:
        lines.append(f"{'':12} {len(found.tied)} more names for them (tied): {_first(found.tied)}")
    where = f"{found.w_pre_bytes / 1e6:,.1f} MB on {found.w_pre_device or 'no device'}"
    lines.append(f"w_pre        {found.w_pre}; {_LOST if found.is_w_pre_lost else where}")
    for reason, names in _by_reason(found.left or {}).items():
        lines.append(f"not {verb:8} {len(names)} ({reason}): {_first(names)}")
    if found.uncalled:
        lines.append(
            f"NOT CALLED   {len(found.uncalled)} (no forward in training reached them): {_first(found.uncalled)}"
        )
    for what, rates in (("set to 0", found.replaced), ("kept", found.kept)):
        if rates:
            lines.append(f"dropout      {len(rates)} {what}: {_first(rates)}")
    return lines


def _rdrop_line(rdrop: RDrop, fired: int) -> str:
    every = "every step" if rdrop.every == 1 else f"one step in {rdrop.every}"
    options = (", the paper's scale" if rdrop.scale == "paper" else "") + (
        ", KL summed" if rdrop.kl_reduction == "sum" else ""
    )
    return (
        f"rdrop        alpha = {rdrop.alpha:g}, {every}, passes {rdrop.passes}{options}; in the loss of {fired} "
        "forwards so far"
    )


_LOST = "MISSING: a pickle does not carry it. Call patch_model with w_pre and all settings again"
_MISSED = "optimizer steps: no forward in training mode came before them"
_NOTHING = "NOTHING IS REGULARIZED, for all of them are frozen"
_UNIT = {"neuron": "input feature", "element": "element"}


def _first(names: Sequence[str]) -> str:
    return ", ".join([*names[:1], *["..."] * (len(names) > 1)])


def _by_reason(left: dict[str, str]) -> dict[str, list[str]]:
    turned: dict[str, list[str]] = {}
    for name, reason in left.items():
        turned.setdefault(reason, []).append(name)
    return turned
