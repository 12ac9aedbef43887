"""All figures of a study: that of its arms, and one for each sweep; as files, or within a page."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.report.drawing import STYLE, render, write_picture
from surgery.report.study.colours import COLOURS
from surgery.report.study.runs import sweeps_of

if TYPE_CHECKING:
    from surgery.study.collect import Study

ARMS = "arms"


def draw_study(study: "Study", suffix: str) -> dict[str, bytes]:
    """Draw all figures as ".png", ".pdf" or ".svg", by name: "arms", and "sweep-" and what was swept."""
    from matplotlib import rc_context

    from surgery.report.study.arms_figure import arms_figure
    from surgery.report.study.sweep_figure import sweep_figure

    with rc_context(STYLE):
        sweeps = {f"sweep-{one.file_name}": sweep_figure(study, one) for one in sweeps_of(study)}
        return {name: render(figure, suffix) for name, figure in ({ARMS: arms_figure(study)} | sweeps).items()}


def write_plots(study: "Study", path: Path) -> None:
    """Write the figure of the arms to a file, and each sweep's beside it: `a.png`, `a-noisytune.png`.

    Raises:
        OutputError: a file cannot be written.
    """
    for name, data in draw_study(study, path.suffix.lower()).items():
        write_picture(data, path if name == ARMS else path.with_stem(f"{path.stem}-{name.removeprefix('sweep-')}"))


def for_page(svg: bytes, prefix: str) -> str:
    """Return an SVG to stand in a page of HTML: ids of its own, the page's colours, nothing of another place.

    Args:
        svg: as `draw_study` returns it.
        prefix: of its ids, so that those of several figures are not the same.
    """
    text = re.sub(r"(?s)<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg.decode())
    start = text.index("<svg")
    box = re.search(r'viewBox="[\d. ]+"', text)
    assert box
    body = text[text.index(">", start) + 1 :]
    return f"<svg {box[0]}>{re.sub(r'<[^>]*>', lambda tag: _rewrite(tag[0], prefix), body).strip()}"


def _rewrite(tag: str, prefix: str) -> str:
    tag = re.sub(r'\bid="', f'id="{prefix}-', tag)
    tag = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}-', tag).replace("url(#", f"url(#{prefix}-")
    for name, (light, _) in COLOURS.items():
        tag = tag.replace(f": {light}", f": var(--{name})")
    return tag.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
