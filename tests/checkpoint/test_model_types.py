"""model_types.json, what it says of names, and whether the installed transformers agrees."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import transformers
import zoo
from make_model_types import TABLE, entry_of, make_table, sweep

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
    assert sorted(entry_of(sweep(model_type).classes)[0]) == table["buffers"].get(model_type, [])


@pytest.mark.sweep
def test_table_is_what_all_classes_say(table):
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        made = make_table(pool.map(sweep, zoo.model_types(), chunksize=8))
    known = set(table["types"].split())
    assert known <= set(made["types"].split())  # more where packages are installed that some classes take
    for kind in ("buffers", "parameters"):
        assert {name: entry for name, entry in made[kind].items() if name in known} == table[kind]


def test_pattern_has_a_star_for_every_number():
    assert as_pattern("h.0.attn.12.bias2.3") == "h.*.attn.*.bias2.*"
    assert as_pattern("0.weight") == "*.weight"


def test_longest_known_ending_of_a_name_decides():
    kind = ModelType("x", frozenset({"pe", "layers.*.decay"}), frozenset({"decoder.pe"}))
    names = {"pe": True, "encoder.pe": True, "decoder.pe": False, "model.decoder.pe": False, "decay": None}
    names |= {"model.layers.11.decay": True, "layers.x.decay": None, "rope": None}
    assert {name: kind.is_buffer(name) for name in names} == names


def test_config_names_the_class():
    assert find_model_type({"model_type": "bert"}) == ModelType("bert", frozenset(), frozenset())
    encodec = find_model_type({"model_type": "encodec"})
    assert encodec.is_buffer("quantizer.layers.3.codebook.embed")
    assert not encodec.is_buffer("encoder.layers.0.conv.weight")


def test_configs_within_a_config_count_too():
    kind = find_model_type({"model_type": "encoder-decoder", "encoder": {"model_type": "encodec"}, "decoder": {}})
    assert kind.name == "encoder-decoder"
    assert kind.is_buffer("encoder.quantizer.layers.3.codebook.embed")


@pytest.mark.parametrize("config", [{}, {"model_type": "unheard_of"}, {"model_type": 3}, {"x": {"model_type": "bert"}}])
def test_class_is_unknown(config):
    assert find_model_type(config) is None
