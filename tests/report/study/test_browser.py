"""The page of a study in a real browser: it fits, it is readable, it asks for nothing and complains of nothing."""

import html
import re
import shutil
from collections.abc import Iterator

import pytest
from browser import Tab, find_chromium, opened


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if not find_chromium():
        pytest.skip("there is no Chromium; Debian's package is `chromium`")
    profile = tmp_path_factory.mktemp("profile")
    with opened(profile) as found:
        yield found
    shutil.rmtree(profile, ignore_errors=True)


_OVERLAPS = """[...document.querySelectorAll('svg')].flatMap(svg => {
  const boxes = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim())
    .map(t => [t.textContent, t.getBoundingClientRect()]);
  const meet = (a, b) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2;
  return boxes.flatMap(([a, one], i) =>
    boxes.slice(i + 1).filter(([, other]) => meet(one, other)).map(([b]) => [a, b]));
})"""


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", ["two", "twelve", "hostile"])
def test_page_fits_a_window_and_complains_of_nothing(name, width, is_dark, folders, tab):
    path = folders[name] / "index.html"
    tab.open(path, width, is_dark=is_dark)
    for state in ("closed", "open"):
        assert tab.evaluate("document.scrollingElement.scrollWidth") <= width, state
        tab.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert tab.evaluate("innerWidth") == width
    assert tab.evaluate(_OVERLAPS) == []
    for seen in (".verdicts li b", "table", "figure svg", "pre.command", "pre.log"):
        box = tab.evaluate(f"document.querySelector('{seen}').getBoundingClientRect().toJSON()")
        assert 0 <= box["left"] < width, seen
        assert min(box["width"], box["height"]) > 10, seen
    assert tab.requests() == [path.as_uri()]
    assert tab.complaints() == []


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_text_of_a_page_stands_out(is_dark, folders, tab):
    """WCAG 2.1, 1.4.3: a contrast of 4.5 at least, of all text and on all that it stands on."""
    tab.open(folders["twelve"] / "index.html", 1400, is_dark=is_dark)
    behind = [
        tab.evaluate(f"getComputedStyle(document.querySelector('{one}')).backgroundColor") for one in ("body", "pre")
    ]
    kinds = ("p", ".muted", "a", ".alarm", ".verdicts .better b", ".idle b", "td", "thead th", "dt", "pre.log")
    styles = [tab.evaluate(f"getComputedStyle(document.querySelector('{one}')).color") for one in kinds]
    styles += tab.evaluate(
        "[...new Set([...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill))]"
    )
    assert min(contrast(style, other) for style in styles for other in behind) >= 4.5
    is_dark_page = contrast(behind[0], "rgb(255, 255, 255)") > 10
    assert is_dark_page == is_dark


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, as WCAG 2.1 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(text) / 255 for text in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_browser_hears_of_what_a_page_must_not_do(tmp_path, tab):
    policy = html.escape("default-src 'none'", quote=True)
    (tmp_path / "a.html").write_text(
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><div style="width: 3000px">a</div>'
        '<script>alert(1)</script><img src="b.png">'
    )
    tab.open(tmp_path / "a.html", 400)
    assert len(tab.complaints()) >= 2
    (tmp_path / "c.html").write_text('<div style="width: 3000px">a</div><img src="b.png">')
    tab.open(tmp_path / "c.html", 400)
    assert tab.evaluate("document.scrollingElement.scrollWidth") > 400
    assert len(tab.requests()) == 2
