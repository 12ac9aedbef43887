"""model_types.json, what it says of names, and whether the installed transformers agrees."""

import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import transformers
import zoo
from make_model_types import TABLE, make_table, sweep, sweep_diffusers

from surgery.checkpoint.described_class import build_model_type, model_type_of
from surgery.checkpoint.model_types import ModelType, as_pattern, find_model_type

SAMPLE = ("bert", "encodec", "minimax", "deepseek_v3", "ibert", "speecht5")


@pytest.fixture(scope="module")
def table():
    table = json.loads(TABLE.read_bytes())
    if table["transformers"] != transformers.__version__:
        pytest.skip(f"the table is of transformers {table['transformers']}")
    return table


@pytest.mark.parametrize("model_type", SAMPLE)
def test_table_is_what_the_classes_say(model_type, table):
    assert model_type in table["types"].split()
    swept = sweep(model_type)
    kind = model_type_of(model_type, swept.classes)
    assert sorted(kind.buffers) == table["buffers"].get(model_type, [])
    assert kind.ties == {name: tuple(s.split()) for name, s in table["ties"].get(model_type, {}).items()}


@pytest.mark.sweep
def test_table_is_what_all_classes_say(table):
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        made = make_table(pool.map(sweep, zoo.model_types(), chunksize=8))
    known = set(table["types"].split()) & set(zoo.model_types())
    assert known <= set(made["types"].split())  # more where packages are installed that some classes take
    for kind in ("classes", "buffers", "parameters", "ties"):
        mine, theirs = ({name: of[kind][name] for name in known & of[kind].keys()} for of in (made, table))
        assert mine == theirs


@pytest.mark.sweep
def test_table_is_what_the_classes_of_diffusers_say():
    diffusers = pytest.importorskip("diffusers")
    table = json.loads(TABLE.read_bytes())
    if table["diffusers"] != diffusers.__version__:
        pytest.skip(f"the table is of diffusers {table['diffusers']}")
    made = make_table(sweep_diffusers())
    known = set(made["types"].split())
    assert known <= set(table["types"].split())
    for kind in ("buffers", "parameters"):
        assert made[kind] == {name: table[kind][name] for name in known & table[kind].keys()}


def test_class_of_diffusers_is_known():
    table = "pos_embed.pos_embed"  # sines, which Stable Diffusion 3 saves, and weights, which AuraFlow trains
    assert find_model_type({"_class_name": "SD3Transformer2DModel"}).is_buffer(table)
    assert not find_model_type({"_class_name": "AuraFlowTransformer2DModel"}).is_buffer(table)
    assert find_model_type({"_class_name": "PriorTransformer"}).is_buffer("clip_mean") is False


def test_pattern_has_a_star_for_every_number():
    assert as_pattern("h.0.attn.12.bias2.3") == "h.*.attn.*.bias2.*"
    assert as_pattern("0.weight") == "*.weight"


def test_longest_known_ending_of_a_name_decides():
    kind = ModelType("x", frozenset({"pe", "layers.*.decay"}), frozenset({"decoder.pe"}))
    names = {"pe": True, "encoder.pe": True, "decoder.pe": False, "model.decoder.pe": False, "decay": None}
    names |= {"model.layers.11.decay": True, "layers.x.decay": None, "rope": None}
    assert {name: kind.is_buffer(name) for name in names} == names


def test_config_names_the_class():
    bert = find_model_type({"model_type": "bert"})
    assert (bert.name, bert.buffers, bert.parameters, bert.is_tied) == ("bert", frozenset(), frozenset(), True)
    encodec = find_model_type({"model_type": "encodec"})
    assert encodec.is_buffer("quantizer.layers.3.codebook.embed")
    assert not encodec.is_buffer("encoder.layers.0.conv.weight")


def test_configs_within_a_config_count_too():
    kind = find_model_type({"model_type": "encoder-decoder", "encoder": {"model_type": "encodec"}, "decoder": {}})
    assert kind.name == "encoder-decoder"
    assert kind.is_buffer("encoder.quantizer.layers.3.codebook.embed")


def test_architecture_names_the_class_of_a_config_without_a_model_type():
    assert find_model_type({"architectures": ["EncodecModel"]}).is_buffer("quantizer.layers.3.codebook.embed")
    assert find_model_type({"architectures": ["BertForMaskedLM", "X"]}).name == "bert"


@pytest.mark.parametrize("config", [{"architectures": []}, {"architectures": ["MyModel"]}, {"architectures": "x"}])
def test_architecture_is_unknown(config):
    assert find_model_type(config) is None


BERT = ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias", "bert.pooler.dense.weight"]
_DECODER = "cls.predictions.decoder"


@pytest.mark.parametrize(
    ("config", "names", "ties"),
    [
        pytest.param(
            {"model_type": "bert"},
            [*BERT, f"{_DECODER}.weight", f"{_DECODER}.bias"],
            {f"{_DECODER}.weight": BERT[0], f"{_DECODER}.bias": BERT[1]},
            id="bert",
        ),
        pytest.param({"model_type": "bert"}, ["x", f"{_DECODER}.weight"], {}, id="what-it-repeats-is-not-there"),
        pytest.param(
            {"model_type": "bart"},
            ["lm_head.weight", "model.shared.weight", "model.decoder.embed_tokens.weight"],
            {"lm_head.weight": "model.shared.weight", "model.decoder.embed_tokens.weight": "model.shared.weight"},
            id="a-chain-ends-at-what-is-stored",
        ),
        pytest.param(
            {"model_type": "encoder-decoder", "decoder": {"model_type": "bert"}, "encoder": {"model_type": "bert"}},
            [f"decoder.{_DECODER}.weight", f"encoder.{BERT[0]}", f"decoder.{BERT[0]}"],
            {f"decoder.{_DECODER}.weight": f"decoder.{BERT[0]}"},
            id="of-two-the-one-in-its-own-part",
        ),
        pytest.param(
            {"model_type": "d_fine"},
            [f"{path}class_embed.{i}.bias" for path in ("", "model.decoder.") for i in (0, 11)],
            {f"class_embed.{i}.bias": f"model.decoder.class_embed.{i}.bias" for i in (0, 11)},
            id="numbers",
        ),
    ],
)
def test_class_ties_names(config, names, ties):
    assert find_model_type(config).find_ties(names) == ties


def test_tied_name_that_is_not_stored_is_known():
    kind = find_model_type({"model_type": "whisper"})
    stored = ["model.decoder.embed_tokens.weight"]
    assert kind.find_ties(stored, ["proj_out.weight", "x.weight"]) == {"proj_out.weight": stored[0]}


def test_numbers_in_a_tie():
    kind = ModelType("x", frozenset(), frozenset(), {"b.*.*.w": ("a.0.*.w",)})
    assert kind.find_ties(["b.3.7.w", "a.0.7.w", "a.3.7.w", "b.3.8.w"]) == {"b.3.7.w": "a.0.7.w"}


def test_name_of_a_million_parts_takes_no_time():
    kind = find_model_type({"model_type": "d_fine"})
    name = "a." * 1_000_000 + "class_embed.3.bias"
    begin = time.monotonic()
    assert ModelType("x", frozenset({"b"}), frozenset()).is_buffer(name) is None
    assert kind.find_ties([name]) == {}
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("config", "is_tied"),
    [
        ({"model_type": "bert"}, True),
        ({"model_type": "llama"}, False),
        ({"model_type": "llama", "tie_word_embeddings": True}, True),
        ({"model_type": "bert", "tie_word_embeddings": False}, False),
        ({"model_type": "gemma3", "text_config": {"tie_word_embeddings": False}}, False),
        ({"model_type": "gemma3", "tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, True),
    ],
)
def test_config_says_whether_weights_are_tied(config, is_tied):
    assert find_model_type(config).is_tied is is_tied


@pytest.mark.parametrize("config", [{}, {"model_type": "unheard_of"}, {"model_type": 3}, {"x": {"model_type": "bert"}}])
def test_class_is_unknown(config):
    assert find_model_type(config) is None


@pytest.mark.usefixtures("table")
def test_class_that_the_table_lacks_is_built():
    """The real config of each, as save_pretrained writes it, against what the table says of the type."""
    for model_type in ("bert", "encodec", "ibert"):
        config = json.loads(zoo.make_config(model_type).to_json_string(use_diff=False))
        built, known = build_model_type(config), find_model_type(config)
        assert built.buffers <= known.buffers | {"running_mean", "running_var"}
        assert built.ties.keys() <= known.ties.keys()
    assert built.buffers


@pytest.mark.transformers
def test_class_that_is_built_says_what_it_ties():
    config = json.loads(zoo.make_config("bert").to_json_string(use_diff=False)) | {"architectures": ["BertForMaskedLM"]}
    ties = build_model_type(config).ties
    assert ties[f"{_DECODER}.weight"] == ("embeddings.word_embeddings.weight",)
    assert ties[f"{_DECODER}.bias"] == ("cls.predictions.bias",)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert", "num_hidden_layers": 10**9}, "expected at most 4096 num_hidden_layers, got 1000000000"),
        ({"model_type": "bert", "hidden_size": 65}, "The hidden size (65) is not a multiple of the number of"),
    ],
)
def test_class_that_cannot_be_built_is_named(config, message, caplog):
    assert build_model_type(config) is None
    assert f"config.json: bert: could not be built: names tell what is a buffer ({message}" in caplog.text


def test_class_that_transformers_does_not_know_is_not_built(caplog):
    assert build_model_type({"model_type": "unheard_of"}) is None
    assert caplog.text == ""
