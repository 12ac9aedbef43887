"""torch.compile of a model under R-Drop: losses and gradients as without it, and no recompilation."""

import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F  # noqa: N812

from surgery import RDrop, SourceError, patch_model, stats, unpatch_model

SIZE, CLASSES, ROWS, STEPS = 8, 3, 6, 5
TWO = RDrop(1.5, passes="two")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler, and g++ is missing")
pytestmark = [  # torch's own, of its compiler
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
REAL_LOSS = nn.CrossEntropyLoss


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    assert nn.CrossEntropyLoss is REAL_LOSS
    assert not torch.overrides._get_current_function_mode_stack()


def by_module(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = nn.CrossEntropyLoss()(logits.view(-1, CLASSES), y.view(-1))
    return loss


def by_function(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, y)


def by_hand(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -logits.log_softmax(-1).gather(1, y[:, None]).mean()


LOSSES = {"module": by_module, "function": by_function, "log_softmax": by_hand}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


class Net(nn.Module):
    """Its noise is the caller's, a row for each pass in turn, so that compiled and eager runs have the same."""

    def __init__(self, loss: Callable[..., torch.Tensor], noise: list[torch.Tensor]) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, CLASSES)
        self.loss, self.noise = loss, Noise(noise)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.noise(self.body(x).tanh()))
        return logits if y is None else self.loss(logits, y)


class Noise(nn.Module):
    def __init__(self, masks: list[torch.Tensor]) -> None:
        super().__init__()
        self.masks = masks

    @torch.compiler.disable
    def draw(self, x: torch.Tensor) -> torch.Tensor:
        torch.rand(())  # as a layer with randomness does
        return self.masks.pop(0).to(x.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.draw(x) if self.training else x


def masks() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(ROWS, SIZE, generator=generator) + 0.5 for _ in range(2 * STEPS)]


def net(loss: Callable[..., torch.Tensor]) -> Net:
    torch.manual_seed(0)
    return Net(loss, masks()).double()


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, SIZE, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (ROWS,), generator=generator)


def train(model: nn.Module, loss: Callable[..., torch.Tensor]) -> Any:
    """Return losses, the last gradient, and how many graphs there are after each step."""
    optimizer, found, graphs = torch.optim.SGD(model.parameters(), 0.1), [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(*rows())
        value.backward()
        optimizer.step()
        found.append(value.item())
        graphs.append(counters["stats"]["unique_graphs"])
    return found, [w.grad.clone() for w in model.parameters()], graphs


def assert_same(found: Any, expected: Any) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-12)
    for grad, wanted in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-12, rtol=1e-12)


def assert_settled(graphs: list[int], *, after: int = 2) -> None:
    assert graphs[0] > 0
    assert len(set(graphs[after - 1 :])) == 1


def of(forward: Callable[..., Any], loss: Callable[..., torch.Tensor], where: str) -> Callable[..., torch.Tensor]:
    return forward if where == "inside" else lambda x, y: loss(forward(x), y)


@losses
@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("every", [1, 2])
def test_compiled_training_is_the_same(loss: Callable[..., torch.Tensor], where: str, every: int) -> None:
    settings = RDrop(1.5, passes="two", every=every)
    eager, model = (patch_model(net(loss), rdrop=settings) for _ in range(2))
    expected = train(eager, of(eager, loss, where))
    found = train(model, of(torch.compile(model, backend="aot_eager"), loss, where))
    assert_same(found, expected)
    assert_settled(found[2], after=2 * every)
    assert stats(model)["rdrop_fired"] == STEPS // every
    assert stats(model)["kl"] == pytest.approx(stats(eager)["kl"])


@losses
def test_model_compiled_in_place_is_the_same(loss: Callable[..., torch.Tensor]) -> None:
    eager, model = (patch_model(net(loss), rdrop=TWO) for _ in range(2))
    expected = train(eager, eager)
    model.compile(backend="aot_eager")
    found = train(model, model)
    assert_same(found, expected)
    assert_settled(found[2])


@losses
def test_compiled_step_function_is_the_same(loss: Callable[..., torch.Tensor]) -> None:
    eager, model = (patch_model(net(loss), rdrop=TWO) for _ in range(2))
    expected = train(eager, lambda x, y: loss(eager(x), y))

    @torch.compile(backend="aot_eager")
    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss(model(x), y)

    found = train(model, step)
    assert_same(found, expected)
    assert_settled(found[2])
    assert stats(model)["rdrop_fired"] == STEPS


@needs_compiler
@pytest.mark.filterwarnings("ignore")
def test_inductor_is_the_same() -> None:
    eager, model = (patch_model(net(by_module), rdrop=TWO) for _ in range(2))
    expected = train(eager, eager)
    found = train(model, torch.compile(model))
    assert found[0] == pytest.approx(expected[0], abs=1e-9)
    assert_settled(found[2])


def test_compiled_mixout_with_rdrop_fires_without_recompiling() -> None:
    model = patch_model(net(by_module), rdrop=1.5, mixout=0.5)
    _, _, graphs = train(model, torch.compile(model, backend="aot_eager"))
    assert_settled(graphs)
    assert stats(model)["rdrop_fired"] == STEPS
    assert stats(model)["kl"] > 0


def test_compiled_eval_and_unpatched_are_plain() -> None:
    model, plain = patch_model(net(by_module), rdrop=TWO), net(by_module)
    compiled = torch.compile(model, backend="aot_eager")
    train(model, compiled)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(compiled.eval()(*rows()), plain.eval()(*rows()))
    fired = stats(model)["rdrop_fired"]
    assert fired == STEPS
    unpatch_model(model)
    torch._dynamo.reset()
    for each in (model, plain):
        each.train().noise.masks[:] = masks()
    assert train(model, compiled)[0] == pytest.approx(train(plain, plain)[0], abs=1e-12)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_interrupted_compiled_forward_gives_the_loss_class_back(error: type[BaseException]) -> None:
    model = patch_model(net(by_module), rdrop=TWO)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(*rows())

    @torch.compiler.disable
    def fail(*_: Any) -> None:
        raise error("stop")

    model.noise.register_forward_hook(fail)
    with pytest.raises(error):
        compiled(*rows())
    unpatch_model(model)
    assert nn.CrossEntropyLoss is REAL_LOSS


def test_unpickling_a_loss_made_before_still_works() -> None:
    """Compiled passes look for the class at its name; an instance of the real one is what it was."""
    kept = nn.CrossEntropyLoss()
    model = patch_model(net(kept), rdrop=TWO)
    eager = patch_model(net(kept), rdrop=TWO)
    assert_same(train(model, torch.compile(model, backend="aot_eager")), train(eager, eager))
    assert stats(model)["rdrop_fired"] == STEPS


def test_compiled_model_cannot_be_patched() -> None:
    compiled = torch.compile(net(by_module), backend="aot_eager")
    with pytest.raises(SourceError, match=re.escape("Call patch_model before torch.compile.")):
        patch_model(compiled, rdrop=TWO)
