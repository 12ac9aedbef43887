"""What all of our pictures share: matplotlib's settings, texts that can be drawn, and files written whole by suffix."""

import os
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import OutputError, SettingError
from surgery.escapes import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")
STYLE: Any = {
    "font.family": ["DejaVu Sans"],  # matplotlib's own
    "text.parse_math": False,  # a $ in a name is no formula
    "text.usetex": False,
    "svg.fonttype": "none",  # text that can be searched and copied
    "svg.hashsalt": "surgery",
    "pdf.fonttype": 42,
}
"""For rc_context: figures are composed and rendered in it."""
_UNDATED: dict[str, Any] = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
"""What keeps the time out of each format: the same picture is the same bytes."""


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be written in the end.

    Raises:
        SettingError: of no format that we draw, or matplotlib is not installed.
        OutputError: it is a folder, or its folder does not exist or cannot be written to.
    """
    if path.suffix.lower() not in FORMATS:
        raise SettingError(f"--plot: expected a file that ends in .png, .pdf or .svg, got {path}. Correct the name.")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OutputError(f"--plot: expected a folder that exists, got {path.parent}. Make it first.")
    if path.is_dir():
        raise OutputError(f"--plot: expected a file, got the folder {path}. Choose another name.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"--plot: expected a folder to write to, got {path.parent}. Choose another.")
    if not has_matplotlib():
        raise SettingError(
            "--plot: expected matplotlib, got no such package. Install it with `pip install 'model-surgery[plot]'`."
        )


def has_matplotlib() -> bool:
    """Tell whether anything can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure, in inches, that makes room for all that is drawn in it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def render(figure: "Figure", suffix: str) -> bytes:
    """Return a figure as PNG, PDF or SVG: ".png", ".pdf" or ".svg". Call it within rc_context(STYLE)."""
    data = BytesIO()
    figure.savefig(data, format=suffix[1:], metadata=_UNDATED[suffix])
    return data.getvalue()


def write_picture(data: bytes, path: Path) -> None:
    """Write a picture whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    part = path.with_name(f".surgery-plot-{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise OutputError(f"{path}: expected a file to write, got {error.strerror}. Choose another.") from error


def drawable(text: str) -> str:
    """Escape what cannot be drawn: controls, and characters that the font does not have."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    return "".join(c if font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in printable(text))
