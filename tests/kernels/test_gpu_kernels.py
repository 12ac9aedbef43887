"""The GPU kernel has the CPU kernels' bits: in Triton's interpreter where there is no GPU, for real where there is."""

import os
import subprocess
import sys
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from surgery import perturb_model
from surgery.kernels import cpu, torch_moments
from surgery.noise import key

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SIZES = (1, 2, 4095, 4096, 4097, 10000)
ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    not find_spec("triton"), reason="Triton is not installed; it comes with CUDA builds of torch"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
cases = [
    pytest.param(
        name, normal, stochastic, id=f"{name}-{'normal' if normal else 'uniform'}-{stochastic and 'stochastic'}"
    )
    for name in DTYPES
    for normal in (False, True)
    for stochastic in (False, True)
]


def weights(dtype: str, size: int) -> torch.Tensor:
    """Draw weights with subnormals, both zeros, and values near the largest, whatever the scale."""
    torch_dtype = DTYPES[dtype]
    info = torch.finfo(torch_dtype)
    w = torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    w[1::7] *= 1e-5
    w[2::11] *= 1e-8
    special = [
        0.0,
        -0.0,
        info.tiny,
        -info.tiny / 2,
        info.smallest_normal / 4,
        info.max,
        -info.max,
        info.max / 2,
        1.0,
        -1.0,
    ]
    w[-len(special) :] = torch.tensor(special, dtype=torch.float64)[: min(size, len(special))]
    return w.to(torch_dtype)


def storage(w: torch.Tensor) -> np.ndarray:
    return (w.view(torch.int16).numpy().view(np.uint16) if w.element_size() == 2 else w.numpy()).copy()


def compare(
    dtype: str, size: int, *, first_block: int, scale: float, normal: bool, stochastic: bool, device: str
) -> None:
    from surgery.kernels import gpu

    w = weights(dtype, size)
    expected = storage(w)
    scale = scale if dtype == "F64" else float(np.float32(scale))
    how = {
        "first_block": first_block,
        "key": key(3, f"w{size}"),
        "scale": scale,
        "is_normal": normal,
        "is_stochastic": stochastic,
    }
    with np.errstate(over="ignore"):
        sums = cpu.add_noise(expected, dtype, **how)
        live = w.to(device)
        got = gpu.add_noise(live, dtype, **how).cpu().numpy()
    assert storage(live.cpu()).tobytes() == expected.tobytes()
    assert ((got[:, 3] > 0) == (sums[:, 3] > 0)).all()
    finite = np.isfinite(sums).all(axis=1)
    np.testing.assert_allclose(got[finite, :3], sums[finite, :3], rtol=1e-9, atol=1e-30)


def compare_all(device: str) -> None:
    """Compare every dtype, noise, rounding and size, in turns of block and scale."""
    for turn, case in enumerate(cases):
        dtype, normal, stochastic = case.values
        scales = (0.15, torch.finfo(DTYPES[dtype]).max, 1e-9, 2e-5)
        for i, size in enumerate(SIZES):
            first_block, scale = (0, 5, 2**20 + 1, 2**22 - 1, 2**33)[(turn + i) % 5], scales[(turn + i) % 4]
            compare(
                dtype, size, first_block=first_block, scale=scale, normal=normal, stochastic=stochastic, device=device
            )


@needs_triton
def test_kernel_interpreted_has_the_bits_of_the_cpu() -> None:
    # a process of its own: Triton reads the variable when it is imported
    code = "import tests.kernels.test_gpu_kernels as t; t.compare_all('cpu')"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.parametrize(("dtype", "normal", "stochastic"), cases)
def test_kernel_compiled_has_the_bits_of_the_cpu(dtype: str, normal: bool, stochastic: bool) -> None:
    largest = torch.finfo(DTYPES[dtype]).max
    for size in (*SIZES, 5_000_000):
        for first_block, scale in ((0, 0.15), (2**22 - 1, 1e-9), (2**33, 2e-5), (7, largest)):
            compare(
                dtype, size, first_block=first_block, scale=scale, normal=normal, stochastic=stochastic, device="cuda"
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_moments_have_the_bits_of_the_cpu(dtype: str, size: int) -> None:
    w = torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64).to(DTYPES[dtype])
    shift = float(w[0])
    assert torch_moments.moments(w, shift).numpy().tobytes() == cpu.moments(storage(w), dtype, shift).tobytes()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("size", [*SIZES, 5_000_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_on_cuda_have_the_bits_of_the_cpu(dtype: str, size: int) -> None:
    w = torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64).to(DTYPES[dtype])
    shift = float(w[0])
    assert (
        torch_moments.moments(w.cuda(), shift).cpu().numpy().tobytes()
        == cpu.moments(storage(w), dtype, shift).tobytes()
    )


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "settings", [{}, {"noise": "normal"}, {"rounding": "stochastic"}, {"scale": "global"}], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_perturb_model_on_cuda_has_the_bits_of_the_cpu(settings: dict[str, str], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(700, 900), torch.nn.Conv2d(4, 8, 3), torch.nn.Linear(900, 3)).to(dtype)
    model[1].weight.data = model[1].weight.data.to(memory_format=torch.channels_last)
    on_gpu = deepcopy(model).cuda()
    recipe, gpu_recipe = perturb_model(model, **settings), perturb_model(on_gpu, **settings)
    for name, parameter in on_gpu.named_parameters():
        assert parameter.is_cuda
        assert torch.equal(parameter.cpu(), model.get_parameter(name))
    assert [tensor.std for tensor in gpu_recipe.tensors] == [tensor.std for tensor in recipe.tensors]
