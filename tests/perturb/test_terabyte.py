"""A checkpoint of 1 TB, sparse on this disk: what is planned of it takes seconds and little memory."""

import json
import random
import sys
from pathlib import Path

import pytest
from commands import clean_env, command

from surgery.engines.execute import run_job
from surgery.engines.job import LOG, Job, Result

SHARDS, TENSORS, ROWS, COLUMNS = 200, 5, 125_000, 4096
MOST_SECONDS, MOST_BYTES = 60.0, 300_000_000  # on a machine that has much else to do; 2 s on one that has not
_PLAN_TASKS = """
import sys
from pathlib import Path
from surgery.noisytune import NoisyTune
from surgery.perturb.hand_out import grouped
from surgery.perturb.plan import make_plan
from surgery.perturb.task import Task
from surgery.perturb.tasks import GlobalMoments, with_ties

source, tasks = map(Path, sys.argv[1:])
plan = with_ties(make_plan(source, tasks / "out", NoisyTune()))
task = Task("finished", plan, GlobalMoments(), None, tasks / "records", 3)
for number, shards in enumerate(grouped(plan.shards)):
    task.of(shards).job(tasks / str(number))
print(number + 1)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 shards of 5 GB, of which only the first bytes of each tensor are on the disk."""
    folder, weight_map, rng = tmp_path_factory.mktemp("terabyte"), {}, random.Random(0)
    nbytes = 2 * ROWS * COLUMNS
    for number in range(1, SHARDS + 1):
        shard, entries = f"model-{number:05}-of-{SHARDS:05}.safetensors", {}
        for each in range(TENSORS):
            name = f"model.layers.{number - 1}.mlp.experts.{each}.down_proj.weight"
            offsets = [each * nbytes, (each + 1) * nbytes]
            entries[name] = {"dtype": "BF16", "shape": [ROWS, COLUMNS], "data_offsets": offsets}
            weight_map[name] = shard
        header = json.dumps(entries).encode()
        with (folder / shard).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + TENSORS * nbytes)
            for each in range(TENSORS):
                file.seek(8 + len(header) + each * nbytes)
                file.write(bytes(rng.randrange(0x3F) for _ in range(64)))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "deepseek_v3"}')
    return folder


@pytest.mark.parametrize("what", ["dry run", "inspect", "tasks"])
def test_planning_takes_seconds(what, source, tmp_path):
    commands = {
        "dry run": command("perturb", source, "--dry-run", "--engine", "ray"),
        "inspect": command("inspect", source),
        "tasks": [sys.executable, "-c", _PLAN_TASKS, str(source), str(tmp_path / "tasks")],
    }
    (tmp_path / "job").mkdir()
    Job(tmp_path / "job", tuple(commands[what]), tmp_path, clean_env()).write()
    assert run_job(tmp_path / "job") == 0
    said = " ".join((tmp_path / "job" / LOG).read_text().split())
    expected = {"dry run": "bytes 1024.00 GB in 200 shards", "inspect": "1024.00 GB in 200 files", "tasks": "200"}
    assert expected[what] in said
    result = Result.read(tmp_path / "job")
    assert result.seconds < MOST_SECONDS
    assert result.peak_memory < MOST_BYTES
