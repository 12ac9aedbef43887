"""The Triton kernel of R-Drop's loss agrees with the torch version: interpreted without a GPU, compiled with one."""

import itertools
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from surgery.hooks.rdrop import rowwise
from surgery.hooks.rdrop.divergence import cross_entropy
from surgery.hooks.rdrop.objective import Objective

ROOT = Path(__file__).parents[3]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {"small": (3, 5), "blocks": (2, 9001), "inner": (2, 5, 3), "one class": (2, 1)}
needs_triton = pytest.mark.skipif(
    not find_spec("triton"), reason="Triton is not installed; it comes with CUDA builds of torch"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def run(a: torch.Tensor, b: torch.Tensor | None, target: torch.Tensor) -> list[torch.Tensor]:
    inputs = [x.detach().requires_grad_() for x in (a, b) if x is not None]
    terms = cross_entropy(inputs[0], inputs[1] if b is not None else None, target, Objective(1.5), reduction="none")
    outer = torch.linspace(0.5, 2, terms.loss.numel()).view(terms.loss.shape).to(terms.loss)
    grads = torch.autograd.grad(terms.loss, inputs, outer)
    return [terms.loss.detach(), terms.ce, terms.kl, *grads]


def compare(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    """Compare the kernel with float64, for halves, a doubled batch, odd strides, masked classes and ignored rows."""
    generator = torch.Generator().manual_seed(shape[1])
    a, b = (2 * torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    if shape[1] > 2:
        a[0, 1] = b[0, 1] = float("-inf")
        a[-1, 2], b[-1, 2] = 1e4, -1e4
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    target[-1] = -100
    expected = run(a.double(), b.double(), target)
    a, b, target = a.to(device), b.to(device), target.to(device)
    strided = [x.repeat_interleave(2, 1)[:, ::2] for x in (a, b)]
    doubled = run(torch.cat([a, b]), None, torch.cat([target, target]))
    doubled[3:] = doubled[3].chunk(2)
    for got in (run(a, b, target), run(*strided, target), doubled):
        for x, y in zip(got, expected, strict=True):
            rtol = 1e-5 if x.dtype == torch.float32 else 1e-2 if dtype == torch.bfloat16 else 2e-3
            torch.testing.assert_close(x.double().cpu(), y, rtol=rtol, atol=1e-6)


def compare_all() -> None:
    rowwise.uses_triton = lambda a: (
        a.dtype != torch.float64
    )  # in a process of its own: only CUDA tensors go to the kernel otherwise
    for dtype, shape in itertools.product(DTYPES, SHAPES.values()):
        compare(dtype, shape, "cpu")


@needs_triton
def test_kernel_interpreted_agrees_with_float64() -> None:
    try:
        int(np.ones(1))
    except TypeError:
        pytest.skip("Triton's interpreter makes loop bounds of arrays, which NumPy refuses from 2.5 on")
    # a process of its own: Triton reads the variable when it is imported
    code = "import tests.hooks.rdrop.test_gpu_divergence as t; t.compare_all()"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), (64, 128256), (2, 262144)], ids=str)
def test_kernel_compiled_agrees_with_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    compare(dtype, shape, "cuda")


@pytest.mark.gpu
@needs_gpu
def test_cuda_without_triton_agrees_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise, "uses_triton", lambda _: False)
    compare(torch.float32, SHAPES["blocks"], "cuda")
