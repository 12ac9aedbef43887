"""A run that is resumed goes on as if it had never been interrupted: the same w_pre, and no second noise."""

from pathlib import Path
from typing import Any

import byhand
import pytest
import torch
from running import SCRIPTS, Run, run

from surgery import perturb_model

WHOLE = "pretrained optimizer", "pretrained same optimizer", "optimizer pretrained"
RESUMED = (
    "pretrained model optimizer state",
    "pretrained optimizer model state",
    "pretrained optimizer state model",
    "pretrained assigned optimizer state",
    "optimizer pretrained model state",
    "optimizer pretrained state model",
)
BLIND = "model optimizer state"


@pytest.fixture(scope="module")
def nets() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        import nets

        yield nets


@pytest.fixture(scope="module")
def runs(nets: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """A whole run, which leaves a checkpoint, and one that is resumed from it in several ways."""
    folder = tmp_path_factory.mktemp("resumed")
    torch.manual_seed(7)
    torch.save(nets.Net().double().state_dict(), folder / "pretrained.pt")
    whole = run(folder, "resumed.py", *byhand.ALL, args=("pretrained.pt", "whole.pt", *WHOLE))
    again = run(folder, "resumed.py", *byhand.ALL, args=("pretrained.pt", "again.pt", *RESUMED, BLIND))
    assert (whole.code, again.code) == (0, 0), whole.err + again.err
    return whole, again


def left(ran: Run, name: str) -> Any:
    return torch.load(ran.folder / name)


@pytest.mark.parametrize("order", WHOLE)
def test_noise_is_for_what_load_state_dict_has_brought(order: str, runs: tuple[Run, Run], nets: Any) -> None:
    model = nets.build()
    model.load_state_dict(left(runs[0], "pretrained.pt"))
    perturb_model(model, lam=byhand.LAM, seed=0)
    wanted = byhand.train(
        model,
        byhand.seeded_steps(nets.batches()),
        model,
        mixed=byhand.Mixed(model),
        optimizer=lambda w, lr: torch.optim.SGD(w, lr=lr, momentum=0.9),
    )
    byhand.assert_equal(left(runs[0], "whole.pt")[order], wanted)


@pytest.mark.parametrize("number", range(len(RESUMED)), ids=RESUMED)
def test_resumed_run_ends_as_the_whole_one(number: int, runs: tuple[Run, Run]) -> None:
    whole, again = runs
    wanted = left(whole, "whole.pt")[WHOLE[0]]
    byhand.assert_equal(left(again, "again.pt")[RESUMED[number]], wanted, tolerance=0)
    assert again.models[number]["distance"] == whole.models[0]["distance"]


def test_resumed_run_without_its_pretrained_weights_adds_no_noise(runs: tuple[Run, Run], nets: Any) -> None:
    _, again = runs
    state = left(again, "checkpoint.pt")
    model = nets.build()
    model.load_state_dict(state["model"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(state["optimizer"])
    steps = byhand.seeded_steps(nets.batches())[3:]
    wanted = byhand.train(model, steps, model, mixed=byhand.Mixed(model), optimizer=lambda *_, **__: optimizer)
    byhand.assert_equal(left(again, "again.pt")[BLIND], wanted)
    assert again.err.count("Net: resumed, without the pretrained weights in sight: w_pre is what the weights were") == 1


def test_resumed_run_goes_on_with_recadams_schedule(nets: Any, tmp_path: Path) -> None:
    torch.manual_seed(7)
    torch.save(nets.Net().double().state_dict(), tmp_path / "pretrained.pt")
    flags = ("--recadam", "3", "--recadam-k", "1", "--recadam-t0", "3")
    whole = run(tmp_path, "resumed.py", *flags, args=("pretrained.pt", "whole.pt", WHOLE[0]))
    again = run(tmp_path, "resumed.py", *flags, args=("pretrained.pt", "again.pt", RESUMED[0]))
    plain = run(tmp_path, "resumed.py", args=("pretrained.pt", "plain.pt", WHOLE[0]))
    assert (whole.code, again.code, plain.code) == (0, 0, 0), whole.err + again.err
    wanted = left(whole, "whole.pt")[WHOLE[0]]
    byhand.assert_equal(left(again, "again.pt")[RESUMED[0]], wanted, tolerance=0)
    assert any(not torch.equal(w, wanted[name]) for name, w in left(plain, "plain.pt")[WHOLE[0]].items())
    assert again.models[0]["recadam_t"] == whole.models[0]["recadam_t"] > again.models[0]["steps"] > 0
