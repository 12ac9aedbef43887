"""Llama's consolidated shards: the tensors of the whole checkpoint, from parts that were cut by hand."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from checkpoints import tree_digest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

torch = pytest.importorskip("torch")

from surgery.checkpoint.consolidated import ConsolidatedFile  # noqa: E402
from surgery.cli import main  # noqa: E402
from surgery.errors import SourceError  # noqa: E402
from surgery.inspect.diff import diff_checkpoints  # noqa: E402
from surgery.inspect.inspection import inspect_checkpoint  # noqa: E402
from surgery.perturb.execute import perturb_checkpoint  # noqa: E402
from surgery.perturb.materialize import materialize_checkpoint  # noqa: E402
from surgery.perturb.verify import verify_checkpoint  # noqa: E402

_PARAMS = {"dim": 8, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 12}
_SHAPES = {
    "tok_embeddings.weight": (12, 8),
    "layers.0.attention.wq.weight": (8, 8),
    "layers.0.attention.wk.weight": (4, 8),
    "layers.0.attention.wv.weight": (4, 8),
    "layers.0.attention.wo.weight": (8, 8),
    "layers.0.feed_forward.w1.weight": (20, 8),
    "layers.0.feed_forward.w2.weight": (8, 20),
    "layers.0.feed_forward.w3.weight": (20, 8),
    "layers.0.feed_forward.experts.1.w2.weight": (8, 20),
    "layers.0.attention_norm.weight": (8,),
    "layers.0.ffn_norm.weight": (8,),
    "norm.weight": (8,),
    "output.weight": (12, 8),
    "rope.freqs": (1,),
}
_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
Weights = dict[str, Any]


def _whole() -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in _SHAPES.items()}


def _cut(name: str, tensor: Any, count: int, embedding: int) -> Any:
    module = name.split(".")[-2]
    dim = embedding if module == "tok_embeddings" else 0 if module in _ROWS else 1 if module in ("wo", "w2") else None
    return [tensor] * count if dim is None else tensor.chunk(count, dim)


def _write(
    folder: Path, count: int = 2, *, embedding: int = 1, edit: Callable[[list[Weights]], Any] | None = None
) -> Path:
    shards: list[Weights] = [{} for _ in range(count)]
    for name, tensor in _whole().items():
        for shard, part in zip(shards, _cut(name, tensor, count, embedding), strict=True):
            shard[name] = part.clone()
    if edit:
        edit(shards)
    folder.mkdir()
    for rank, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{rank:02}.pth")
    (folder / "params.json").write_text(json.dumps(_PARAMS))
    (folder / "tokenizer.model").write_bytes(b"x")
    return folder


def _read(file: Any, tensor: Any, step: int) -> bytes:
    buffer = bytearray(tensor.nbytes)
    for start in range(0, tensor.nbytes, step):
        file.read_into(tensor, start, memoryview(buffer)[start : start + step])
    return bytes(buffer)


@pytest.mark.parametrize(("count", "embedding"), [(2, 1), (2, 0), (4, 1)], ids=["Llama 2", "Llama 3", "four"])
def test_shards_are_read_as_the_whole(count: int, embedding: int, tmp_path: Path) -> None:
    folder = _write(tmp_path / "llama", count, embedding=embedding)
    file = ConsolidatedFile(sorted(folder.glob("*.pth")))
    whole = _whole()
    assert {tensor.name: tensor.shape for tensor in file.header.tensors} == _SHAPES
    for tensor in file.header.tensors:
        expected = whole[tensor.name].view(torch.uint8).numpy().tobytes()
        assert [_read(file, tensor, step) for step in (7, 24, 1 << 20)] == [expected] * 3
    file.close()


def test_threads_read_at_once(tmp_path: Path) -> None:
    file = ConsolidatedFile(sorted(_write(tmp_path / "llama").glob("*.pth")))
    found: dict[str, bytes] = {}
    threads = [
        threading.Thread(target=lambda t=tensor: found.update({t.name: _read(file, t, 6)}))
        for tensor in file.header.tensors
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in _whole().items()}


def test_perturbed_as_the_whole_in_one_file_would_be(tmp_path: Path) -> None:
    source = _write(tmp_path / "llama")
    perturb_checkpoint(source, tmp_path / "out", seed=3)
    (tmp_path / "one").mkdir()
    save_file(_whole(), tmp_path / "one/consolidated.safetensors")
    perturb_checkpoint(tmp_path / "one", tmp_path / "expected", seed=3)
    made, expected = (load_file(tmp_path / name / "consolidated.safetensors") for name in ("out", "expected"))
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    written = ["README.md", "consolidated.safetensors", "params.json", "surgery.json", "tokenizer.model"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == written
    assert not diff_checkpoints(tmp_path / "one", source).tensors[0].pair.changed  # type: ignore[union-attr]
    assert len(inspect_checkpoint(source).tensors) == len(_SHAPES)


def test_recipe_holds_one_digest_of_all_shards(tmp_path: Path) -> None:
    """As `b3sum consolidated.*.pth | b3sum` prints it."""
    source = _write(tmp_path / "llama")
    recipe = perturb_checkpoint(source, tmp_path / "out")
    lines = [f"{blake3(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(source.glob("*.pth"))]
    (file,) = recipe.files
    assert (file.source, file.name) == ("consolidated.00.pth", "consolidated.safetensors")
    assert file.source_digest == f"blake3:{blake3(''.join(lines).encode()).hexdigest()}"


def test_verify_and_materialize_and_the_same_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = _write(tmp_path / "llama")

    def surgery(*args: str) -> tuple[int, str]:
        ran = CliRunner().invoke(main, list(args))
        return ran.exit_code, ran.output

    assert surgery("perturb", "llama", "-o", "out")[0] == 0
    assert surgery("verify", "out")[0] == 0
    assert surgery("materialize", "out", "-o", "again")[0] == 0
    assert tree_digest(tmp_path / "again") == tree_digest(tmp_path / "out")
    assert "nothing: this command had finished here before" in surgery("perturb", "llama", "-o", "out")[1]
    (source / "consolidated.01.pth").write_bytes((source / "consolidated.00.pth").read_bytes())
    for call in (verify_checkpoint, lambda out: materialize_checkpoint(out, tmp_path / "third")):
        with pytest.raises(SourceError, match=r"consolidated.00.pth: expected the recipe's source \(blake3 "):
            call(tmp_path / "out")
    code, said = surgery("perturb", "llama", "-o", "out")
    assert (code, "expected a new or empty folder" in said) == (1, True)


@pytest.mark.parametrize("rank", [0, 1])
def test_shard_that_is_replaced_or_cut_while_it_is_read(rank: int, tmp_path: Path) -> None:
    folder = _write(tmp_path / "llama")
    file = ConsolidatedFile(sorted(folder.glob("*.pth")))
    digest = file.digest("blake3")
    assert digest
    shard = folder / f"consolidated.{rank:02}.pth"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SourceError, match=f"{shard}: expected a file at rest, got one that changed"):
        file.read_into(file.header.tensors[0], 0, memoryview(bytearray(8)))
    with pytest.raises(SourceError, match=f"{shard}: expected a file at rest, got one that changed"):
        file.settle(digest)


def _rename(shards: list[Weights]) -> None:
    shards[1]["layers.1.x"] = shards[1].pop("norm.weight")


def _add(shards: list[Weights]) -> None:
    for shard in shards:
        shard["layers.0.attention.wq.bias"] = torch.ones(4)


def _reshape(shards: list[Weights]) -> None:
    shards[1]["output.weight"] = torch.ones(5, 8).bfloat16()


def _widen(shards: list[Weights]) -> None:
    for shard in shards:
        shard["layers.0.feed_forward.w2.weight"] = torch.ones(9, 10).bfloat16()


def _alter(shards: list[Weights]) -> None:
    shards[1]["norm.weight"][3] += 1


_FAULTS: dict[str, tuple[Callable[[list[Weights]], Any], str]] = {
    "other names": (
        _rename,
        "{}/consolidated.01.pth: expected the names of consolidated.00.pth, got 2 in only one of the two "
        "('layers.1.x', 'norm.weight'). Fetch the shards of one checkpoint.",
    ),
    "unknown cut": (
        _add,
        "{}/consolidated.00.pth: 'layers.0.attention.wq.bias': expected a name of Llama's, whose cut into shards is "
        "known, got another. Join the shards into one file first.",
    ),
    "other shape": (
        _reshape,
        "{}/consolidated.01.pth: 'output.weight': expected BF16 [6, 8], as consolidated.00.pth has it, got BF16 "
        "[5, 8]. Fetch the shards of one checkpoint.",
    ),
    "not of params.json": (
        _widen,
        "{}/consolidated.00.pth: 'layers.0.feed_forward.w2.weight': expected [8, any], as params.json has it, got "
        "[9, 20] of 2 shards. Fetch the missing shards, or the right params.json.",
    ),
    "copies differ": (
        _alter,
        "{}/consolidated.01.pth: 'norm.weight': expected a copy of consolidated.00.pth's, got other values. "
        "Fetch the shards of one checkpoint.",
    ),
}


@pytest.mark.parametrize(("edit", "message"), _FAULTS.values(), ids=_FAULTS)
def test_shards_that_do_not_fit_are_refused(edit: Callable[[list[Weights]], Any], message: str, tmp_path: Path) -> None:
    folder = _write(tmp_path / "llama", edit=edit)
    with pytest.raises(SourceError) as error:
        inspect_checkpoint(folder)
    assert str(error.value) == message.format(folder)


def test_missing_shards_are_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "llama", 4)
    (folder / "consolidated.03.pth").unlink()
    with pytest.raises(SourceError, match=r"expected \[4, 8\], as params.json has it, got \[3, 8\] of 3 shards. "):
        inspect_checkpoint(folder)
    for rank in (1, 0):
        (folder / f"consolidated.{rank:02}.pth").unlink()
        with pytest.raises(SourceError) as error:
            inspect_checkpoint(folder)
        assert str(error.value) == (
            f"{folder}: expected consolidated.00.pth and its siblings up to 02, got no consolidated.{rank:02}.pth. "
            "Fetch the missing shard."
        )


@pytest.mark.parametrize("text", [None, "{", '{"n_heads": 4}', '{"dim": "x"}', "[]"])
def test_sizes_are_needed(text: str | None, tmp_path: Path) -> None:
    folder = _write(tmp_path / "llama")
    (folder / "params.json").unlink() if text is None else (folder / "params.json").write_text(text)
    with pytest.raises(SourceError) as error:
        inspect_checkpoint(folder)
    expected = f"{folder}/params.json: expected the sizes of the shards beside it, such as dim, got none. Fetch it too."
    assert str(error.value) == expected


def test_vocabulary_of_minus_one_is_the_tokenizers(tmp_path: Path) -> None:
    folder = _write(tmp_path / "llama")
    (folder / "params.json").write_text(json.dumps(_PARAMS | {"vocab_size": -1}))
    assert len(inspect_checkpoint(folder).tensors) == len(_SHAPES)
    (folder / "params.json").write_text(json.dumps(_PARAMS | {"vocab_size": 13}))
    with pytest.raises(SourceError, match=r"expected \[13, 8\], as params.json has it, got \[12, 8\] of 2 shards"):
        inspect_checkpoint(folder)


def test_one_of_several_shards_is_no_checkpoint(tmp_path: Path) -> None:
    folder = _write(tmp_path / "llama")
    with pytest.raises(SourceError) as error:
        inspect_checkpoint(folder / "consolidated.01.pth")
    assert str(error.value) == (
        f"{folder}/consolidated.01.pth: expected a whole checkpoint, got one of Llama's model-parallel shards. "
        "Name its folder."
    )


def test_single_file_is_the_checkpoint(tmp_path: Path) -> None:
    folder = _write(tmp_path / "llama", 1)
    recipe = perturb_checkpoint(folder, tmp_path / "out")
    assert [(file.source, file.name) for file in recipe.files] == [("consolidated.00.pth", "model.safetensors")]
