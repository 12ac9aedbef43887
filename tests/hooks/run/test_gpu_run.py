"""`surgery run` gives to the bit what patch_model gives, on a GPU as on the CPU."""

from pathlib import Path

import pytest
import torch
from running import SCRIPTS, run

from surgery import patch_model, perturb_model

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_run_gives_what_patch_model_gives(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "--noisytune", "0.15", "--mixout", "0.5", "--rdrop", "1", "--anchor", "0.1"
    ran = run(tmp_path, "on_device.py", *flags, args=(device, tmp_path / "final.pt"))
    assert ran.code == 0, ran.err

    monkeypatch.syspath_prepend(SCRIPTS)
    import nets
    import on_device

    model = nets.build().to(device)
    perturb_model(model, lam=0.15, seed=0)
    wanted = on_device.train(patch_model(model, mixout=0.5, rdrop=1.0, anchor=0.1), device)
    for name, value in torch.load(tmp_path / "final.pt").items():
        assert torch.equal(value, wanted[name]), name
