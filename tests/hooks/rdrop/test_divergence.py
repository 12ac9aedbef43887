"""R-Drop's loss against the paper's equation in float64, written from its definition; and its gradients."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, kl_divergence
from torch.nn import functional as F  # noqa: N812

from surgery import SettingError
from surgery.hooks.rdrop import divergence, rowwise
from surgery.hooks.rdrop.divergence import cross_entropy, log_softmax, mse_loss, nll_loss
from surgery.hooks.rdrop.objective import Objective, RDropLoss

ALPHA = 1.3
OBJECTIVE = Objective(ALPHA)
C = 5
REDUCTIONS = ("mean", "sum", "none")
SHAPES = {"rows": (6, C), "single": (C,), "sequence": (3, C, 4), "image": (2, C, 2, 3)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(*shape).requires_grad_(), draw(*shape, seed=1).requires_grad_()


def classes(shape: tuple[int, ...], seed: int = 2) -> torch.Tensor:
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    return torch.randint(0, C, rows, generator=torch.Generator().manual_seed(seed))


def symmetric(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1/2 [KL(p||q) + KL(q||p)] of each row, classes last."""
    p, q = Categorical(logits=a), Categorical(logits=b)
    return 0.5 * (kl_divergence(p, q) + kl_divergence(q, p))


def expected(
    a: torch.Tensor, b: torch.Tensor, target: torch.Tensor, *, reduction: str, sums: bool = False, **how: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return loss, ce and kl, one row after the other."""
    ce = 0.5 * (
        F.cross_entropy(a, target, reduction=reduction, **how) + F.cross_entropy(b, target, reduction=reduction, **how)
    )
    one = a.dim() == 1
    s = symmetric(a, b) if one else symmetric(a.movedim(1, -1), b.movedim(1, -1))
    weight, flat = how.get("weight"), []
    for row in itertools.product(*map(range, s.shape)):
        y = None if target.shape == a.shape else int(target[row])
        if y == how.get("ignore_index", -100):
            flat.append(0.0)
        else:
            flat.append(1.0 if y is None or weight is None else float(weight[y]))
    coefficient = torch.tensor(flat, dtype=torch.float64).view(s.shape)
    if sums:
        kl = s * (coefficient != 0)
        kl = kl if reduction == "none" else kl.sum()
    else:
        kl = s * coefficient
        kl = {"none": kl, "sum": kl.sum(), "mean": kl.sum() / coefficient.sum()}[reduction]
    return ce + ALPHA / 2 * kl, ce.detach(), kl.detach()


def check(terms: RDropLoss, reference: tuple[torch.Tensor, ...], *inputs: torch.Tensor) -> None:
    loss = reference[0]
    torch.testing.assert_close(terms.loss, loss)
    assert not terms.ce.requires_grad
    assert terms.kl.dim() == 0
    outer = draw(*loss.shape, seed=9)
    grads = torch.autograd.grad(terms.loss, inputs, outer)
    for got, want in zip(grads, torch.autograd.grad(loss, inputs, outer), strict=True):
        torch.testing.assert_close(got, want)


@shapes
@reductions
@pytest.mark.parametrize(
    ("sums", "weighted", "ignored"),
    [(False, False, -100), (False, True, 2), (True, False, 2), (True, True, -100)],
    ids=["plain", "weighted-ignored", "sum-ignored", "sum-weighted"],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_the_equation(
    shape: tuple[int, ...], reduction: str, sums: bool, weighted: bool, smoothing: float, ignored: int
) -> None:
    (a, b), target = pair(*shape), classes(shape)
    if shape == (C,):
        target = torch.tensor(1)
    how = {"ignore_index": ignored, "label_smoothing": smoothing}
    how["weight"] = draw(C, seed=3).abs() if weighted else None
    terms = cross_entropy(a, b, target, Objective(ALPHA, sums_kl=sums), reduction=reduction, **how)
    check(terms, expected(a, b, target, reduction=reduction, sums=sums, **how), a, b)


@shapes
@reductions
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_cross_entropy_with_probabilities_is_the_equation(
    shape: tuple[int, ...], reduction: str, weighted: bool
) -> None:
    a, b = pair(*shape)
    target = draw(*shape, seed=4).softmax(0 if len(shape) == 1 else 1)
    how = {"weight": draw(C, seed=3).abs() if weighted else None, "label_smoothing": 0.1}
    terms = cross_entropy(a, b, target, OBJECTIVE, reduction=reduction, **how)
    check(terms, expected(a, b, target, reduction=reduction, **how), a, b)


@shapes
@reductions
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_nll_loss_of_log_softmax_is_cross_entropy(shape: tuple[int, ...], reduction: str, weighted: bool) -> None:
    (a, b), target = pair(*shape), classes(shape)
    dim = 0 if len(shape) == 1 else 1
    how = {"weight": draw(C, seed=3).abs() if weighted else None, "ignore_index": 2}
    if shape == (C,):
        target = torch.tensor(1)
    terms = nll_loss(a.log_softmax(dim), b.log_softmax(dim), target, OBJECTIVE, reduction=reduction, **how)
    check(terms, expected(a, b, target, reduction=reduction, **how), a, b)


@pytest.mark.parametrize("shape", [s for s in SHAPES.values() if len(s) > 1], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@reductions
def test_doubled_batch_is_its_halves(shape: tuple[int, ...], smoothing: float, reduction: str) -> None:
    (a, b), target = pair(*shape), classes(shape)
    both = torch.cat([a, b]).detach().requires_grad_()
    how = {"reduction": reduction, "label_smoothing": smoothing}
    terms, pairs = (
        cross_entropy(both, None, torch.cat([target, target]), OBJECTIVE, **how),
        cross_entropy(a, b, target, OBJECTIVE, **how),
    )
    assert all(torch.equal(x, y) for x, y in zip(terms, pairs, strict=True))
    terms.loss.sum().backward()
    pairs.loss.sum().backward()
    assert torch.equal(both.grad, torch.cat([a.grad, b.grad]))


@pytest.mark.parametrize("chunk", [1, 7, 40])
@pytest.mark.parametrize("shape", [(9, C), (3, C, 4)], ids=str)
def test_chunks_do_not_show(chunk: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    (a, b), target = pair(*shape), classes(shape)
    monkeypatch.setattr(rowwise, "_CPU_CHUNK", chunk)
    check(cross_entropy(a, b, target, OBJECTIVE), expected(a, b, target, reduction="mean"), a, b)


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "cross_entropy": lambda a, b: cross_entropy(a, b, torch.tensor([1, -100, 3]), OBJECTIVE, reduction="none").loss,
    "smoothed": lambda a, b: cross_entropy(a, b, torch.tensor([1, -100, 3]), OBJECTIVE, label_smoothing=0.1).loss,
    "nll_loss": lambda a, b: nll_loss(a, b, torch.tensor([1, -100, 3]), OBJECTIVE).loss,
    "bce_logits": lambda a, b: (
        divergence.binary_cross_entropy_with_logits(a, b, torch.rand_like(a) * 0 + 0.3, OBJECTIVE).loss
    ),
    "bce": lambda a, b: divergence.binary_cross_entropy(a.sigmoid(), b.sigmoid(), a.detach() * 0 + 0.3, OBJECTIVE).loss,
    "mse": lambda a, b: mse_loss(a, b, a.detach() * 0, b.detach() * 0 + 1, OBJECTIVE).loss,
    "log_softmax": lambda a, b: log_softmax(a, b, -1, OBJECTIVE, lambda *_: None),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_gradient_is_that_of_the_value(loss: Callable[..., torch.Tensor]) -> None:
    assert torch.autograd.gradcheck(loss, pair(3, C))


def test_second_derivative_is_refused() -> None:
    a, b = pair(3, C)
    with pytest.raises(RuntimeError, match="rdrop: expected create_graph=False, got True"):
        torch.autograd.grad(cross_entropy(a, b, classes((3, C)), OBJECTIVE).loss, a, create_graph=True)


@reductions
@pytest.mark.parametrize("sums", [False, True], ids=["match", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_binary_cross_entropy_is_the_equation(reduction: str, sums: bool, weighted: bool, kind: str) -> None:
    a, b = pair(4, 3)
    target, weight = draw(4, 3, seed=2).sigmoid(), draw(3, seed=3).abs() if weighted else torch.ones(3).double()
    p, q = Bernoulli(logits=a), Bernoulli(logits=b)
    s = 0.5 * (kl_divergence(p, q) + kl_divergence(q, p)) * (1 if sums else weight)
    how = {"weight": weight if weighted else None, "reduction": reduction}
    objective = Objective(ALPHA, sums_kl=sums)
    if kind == "logits":
        positive = draw(3, seed=5).abs()
        terms = divergence.binary_cross_entropy_with_logits(a, b, target, objective, pos_weight=positive, **how)
        ce = [F.binary_cross_entropy_with_logits(x, target, pos_weight=positive, **how) for x in (a, b)]
    else:
        terms = divergence.binary_cross_entropy(a.sigmoid(), b.sigmoid(), target, objective, **how)
        ce = [F.binary_cross_entropy(x.sigmoid(), target, **how) for x in (a, b)]
    kl = s if reduction == "none" else s.sum() if sums or reduction == "sum" else s.mean()
    mean = (ce[0] + ce[1]) / 2
    check(terms, (mean + ALPHA / 2 * kl, mean.detach(), kl.detach()), a, b)


def test_binary_cross_entropy_at_0_and_1_is_clamped() -> None:
    p, q = torch.tensor([0.0, 1.0, 0.0]).requires_grad_(), torch.tensor([1.0, 1.0, 0.0]).requires_grad_()
    terms = divergence.binary_cross_entropy(p, q, torch.tensor([0.0, 1.0, 1.0]), OBJECTIVE, reduction="none")
    terms.loss.sum().backward()
    assert terms.loss.tolist() == pytest.approx([50 + ALPHA / 2 * 100, 0, 100])
    assert p.grad.isfinite().all()
    assert q.grad.isfinite().all()


@reductions
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_mse_loss_compares_the_residuals(reduction: str, weighted: bool) -> None:
    a, b = pair(4, 3)
    one, two, weight = (
        draw(4, 3, seed=2),
        draw(4, 3, seed=3),
        draw(4, 3, seed=4).abs() if weighted else torch.ones(4, 3).double(),
    )

    def reduce(squares: torch.Tensor) -> torch.Tensor:
        squares = squares * weight
        return {"none": squares, "sum": squares.sum(), "mean": squares.sum() / weight.sum()}[reduction]

    terms = mse_loss(a, b, one, two, OBJECTIVE, weight=weight if weighted else None, reduction=reduction)
    ce, kl = (reduce((a - one) ** 2) + reduce((b - two) ** 2)) / 2, reduce(((a - one) - (b - two)) ** 2)
    check(terms, (ce + ALPHA / 2 * kl, ce.detach(), kl.detach()), a, b)


def test_mse_loss_sums_unweighted() -> None:
    a, b, weight = draw(4), draw(4, seed=1), draw(4, seed=2).abs()
    terms = mse_loss(a, b, a * 0, a * 0, Objective(1, sums_kl=True), weight=weight)
    torch.testing.assert_close(terms.loss, (weight * (a**2 + b**2)).sum() / weight.sum() / 2 + ((a - b) ** 2).sum() / 2)


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_paper_scale_doubles_the_loss_only(alpha: float) -> None:
    a, b, target = draw(4, C), draw(4, C, seed=1), classes((4, C))
    one, two = (cross_entropy(a, b, target, Objective(alpha, factor)) for factor in (1, 2))
    assert two == (2 * one.loss, one.ce, one.kl)


def test_alpha_0_is_the_mean_of_both_even_where_the_divergence_is_infinite() -> None:
    a, b = draw(3, C), draw(3, C, seed=1)
    b[0, 1] = float("-inf")
    target = torch.tensor([2, 1, 0])
    terms = cross_entropy(a, b, target, Objective(0))
    torch.testing.assert_close(terms.loss, (F.cross_entropy(a, target) + F.cross_entropy(b, target)) / 2)


@reductions
def test_all_rows_ignored_is_what_torch_says(reduction: str) -> None:
    (a, b), target = pair(3, C), torch.full((3,), -100)
    terms = cross_entropy(a, b, target, OBJECTIVE, reduction=reduction)
    terms.loss.sum().backward()
    torch.testing.assert_close(terms.loss, F.cross_entropy(a, target, reduction=reduction), equal_nan=True)
    assert (a.grad == 0).all()
    assert (b.grad == 0).all()


@reductions
def test_empty_batch_is_what_torch_says(reduction: str) -> None:
    (a, b), target = pair(0, C), torch.empty(0, dtype=torch.int64)
    terms = cross_entropy(a, b, target, OBJECTIVE, reduction=reduction)
    torch.testing.assert_close(terms.loss, F.cross_entropy(a, target, reduction=reduction), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_dtype_of_the_loss_is_torchs(dtype: torch.dtype, autocast: bool) -> None:
    a, b, target = draw(4, 300).to(dtype), draw(4, 300, seed=1).to(dtype), classes((4, 300))
    losses = {
        "cross_entropy": (target,), "binary_cross_entropy_with_logits": (a.sigmoid(),), "nll_loss": (target,),
    }  # fmt: skip
    with torch.autocast("cpu", enabled=autocast):
        for name, args in losses.items():
            terms = getattr(divergence, name)(a, b, *args, OBJECTIVE)
            assert terms.loss.dtype == getattr(F, name)(a, *args).dtype
            assert terms.ce.dtype == terms.kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert mse_loss(a, b, a, a, OBJECTIVE).loss.dtype == F.mse_loss(a, a).dtype
        assert log_softmax(a, b, 1, OBJECTIVE, print).dtype == F.log_softmax(a, 1).dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    a, b, target = draw(2, 30000).to(dtype), draw(2, 30000, seed=1).to(dtype), classes((2, 30000))
    exact = [x.double().requires_grad_() for x in (a, b)]
    want = cross_entropy(*exact, target, OBJECTIVE, reduction="sum")
    got = cross_entropy(a.requires_grad_(), b.requires_grad_(), target, OBJECTIVE, reduction="sum")
    torch.testing.assert_close([got.ce, got.kl], [want.ce.float(), want.kl.float()])
    for x, y in zip(torch.autograd.grad(got.loss, (a, b)), torch.autograd.grad(want.loss, exact), strict=True):
        torch.testing.assert_close(x, y.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["cross_entropy", "smoothed", "nll_loss", "log_softmax"])
def test_extreme_logits_give_no_nan(name: str, dtype: torch.dtype) -> None:
    a, b = (draw(3, C, seed=seed) for seed in range(2))
    a[0, 0], b[0, 0] = 1e4, -1e4
    a[1], b[1] = 1e4, -1e4
    a, b = a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()
    loss = LOSSES[name](a, b) if name != "nll_loss" else LOSSES[name](a.log_softmax(1), b.log_softmax(1))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()


@pytest.mark.parametrize("is_log", [False, True], ids=["logits", "log p"])
def test_classes_ruled_out_by_both_contribute_nothing(is_log: bool) -> None:
    a, b, target = draw(4, C), draw(4, C, seed=1), torch.tensor([0, 1, 0, 1])
    reference = cross_entropy(a[:, :3], b[:, :3], target, OBJECTIVE)
    a[:, 3:] = b[:, 3:] = float("-inf")
    a.requires_grad_()
    loss = (
        nll_loss(a.log_softmax(1), b.log_softmax(1), target, OBJECTIVE)
        if is_log
        else cross_entropy(a, b, target, OBJECTIVE)
    )
    loss.loss.backward()
    torch.testing.assert_close(loss.loss.detach(), reference.loss)
    assert a.grad.isfinite().all()


def test_class_ruled_out_by_one_is_huge_and_never_nan() -> None:
    a, b = draw(2, C).float().requires_grad_(), draw(2, C, seed=1).float()
    b[0, 4] = float("-inf")
    terms = cross_entropy(a, b, torch.tensor([0, 1]), OBJECTIVE)
    terms.loss.backward()
    assert terms.kl > 1e30
    assert not a.grad.isnan().any()


def test_equal_logits_have_no_divergence_whatever_their_offset() -> None:
    a = draw(4, C)
    torch.testing.assert_close(cross_entropy(a, a + 100, classes((4, C)), OBJECTIVE).kl, torch.zeros(()).double())


@pytest.mark.parametrize("strided", ["transposed", "sliced", "expanded"])
def test_strides_do_not_show(strided: str) -> None:
    make = {
        "transposed": lambda x: x.transpose(1, 2), "sliced": lambda x: x.movedim(1, 2)[:, ::2, :3],
        "expanded": lambda x: x[:, :, :1].expand(-1, -1, 4),
    }[strided]  # fmt: skip
    a, b = pair(3, C, C)
    target = torch.ones(make(a).shape[:1] + make(a).shape[2:], dtype=torch.int64)
    terms = cross_entropy(make(a), make(b), target, OBJECTIVE)
    check(terms, expected(make(a), make(b), target, reduction="mean"), a, b)


@pytest.mark.parametrize("which", [0, 1])
def test_only_one_needs_a_gradient(which: int) -> None:
    inputs, target = [draw(3, C), draw(3, C, seed=1)], classes((3, C))
    inputs[which].requires_grad_()
    check(cross_entropy(*inputs, target, OBJECTIVE), expected(*inputs, target, reduction="mean"), inputs[which])


def test_inputs_stay_as_they_are_and_a_retained_graph_gives_the_same_again() -> None:
    a, b = pair(3, C)
    before = a.detach().clone(), b.detach().clone()
    loss = cross_entropy(a, b, classes((3, C)), OBJECTIVE).loss
    first = torch.autograd.grad(3 * loss, (a, b), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (a, b))
    assert all(torch.equal(x, y) for x, y in zip((*first, a, b), (*second, *before), strict=True))


@pytest.mark.parametrize("rows", [2, 4], ids=["fewer", "more"])
def test_labels_of_another_length_are_refused(rows: int) -> None:
    with pytest.raises(SettingError, match=rf"target: expected shape \(3,\) for logits of \(3, 5\), got \({rows},\)\."):
        cross_entropy(draw(3, C), draw(3, C), torch.zeros(rows, dtype=torch.int64), OBJECTIVE)


def test_unknown_reduction_is_refused() -> None:
    with pytest.raises(SettingError, match="reduction: expected none, mean or sum, got 'max'"):
        cross_entropy(draw(3, C), draw(3, C), classes((3, C)), OBJECTIVE, reduction="max")


def test_log_softmax_refuses_to_sum() -> None:
    message = (
        'kl_reduction: expected "match" for a loss computed from log_softmax, got "sum".*cross_entropy or nll_loss'
    )
    with pytest.raises(SettingError, match=message):
        log_softmax(draw(3, C), draw(3, C), 1, Objective(1, sums_kl=True), print)


def test_log_softmax_on_the_papers_scale_is_twice_the_loss() -> None:
    (a, b), target, seen = pair(4, C), classes((4, C)), []
    c = log_softmax(a, b, 1, Objective(ALPHA, factor=2), lambda *parts: seen.append(parts))
    loss, ce, kl = expected(a, b, target, reduction="mean")
    got = F.nll_loss(c, target)
    got.backward()
    torch.testing.assert_close(got, 2 * loss)
    torch.testing.assert_close(seen, [(ce, kl)])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(6, C), (3, C, 4)], ids=str)
def test_log_softmax_under_nll_loss_is_cross_entropy(reduction: str, shape: tuple[int, ...]) -> None:
    (a, b), target, seen = pair(*shape), classes(shape), []
    weight = draw(C, seed=3).abs()
    c = log_softmax(a, b, 1, OBJECTIVE, lambda *parts: seen.append(parts))
    how = {"weight": weight, "ignore_index": 2, "reduction": reduction}
    loss, want = F.nll_loss(c, target, **how), expected(a, b, target, **how)
    torch.testing.assert_close(loss, want[0])
    grads = torch.autograd.grad(1024 * loss, (a, b))
    torch.testing.assert_close(grads, torch.autograd.grad(1024 * want[0], (a, b)))
    mean = expected(a, b, target, **how | {"reduction": "mean"})
    torch.testing.assert_close(seen, [mean[1:]])
    assert not seen[0][0].requires_grad


def test_log_softmax_under_the_label_smoother_of_transformers() -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    a, b = pair(2, 4, C)
    labels = torch.tensor([[0, 1, -100, 2], [3, -100, -100, 4]])
    c = log_softmax(a, b, -1, OBJECTIVE, lambda *_: None)
    # the smoother takes logits, of whose log_softmax it makes the loss
    loss = _smooth(LabelSmoother(0.1), c, labels)
    valid = labels != -100
    ce = sum(F.cross_entropy(x[valid], labels[valid], label_smoothing=0.1) for x in (a, b)) / 2
    want = ce + ALPHA / 2 * symmetric(a, b)[valid].mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, (a, b)), torch.autograd.grad(want, (a, b)))


def _smooth(smoother: Any, c: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "log_softmax", lambda _, **__: c)
        patch.setattr(torch.nn.functional, "log_softmax", lambda _, **__: c)
        return smoother({"logits": c}, labels)


def test_log_softmax_under_kl_div_is_a_teachers_divergence() -> None:
    (a, b), teacher = pair(4, C), draw(4, C, seed=2).softmax(1)
    loss = F.kl_div(log_softmax(a, b, 1, OBJECTIVE, lambda *_: None), teacher, reduction="batchmean")
    mean = sum((teacher * (teacher.log() - x.log_softmax(1))).sum(1).mean() for x in (a, b)) / 2
    torch.testing.assert_close(loss, mean + ALPHA / 2 * symmetric(a, b).mean())


def test_log_softmax_records_nothing_where_no_row_has_weight() -> None:
    (a, b), seen = pair(3, C), []
    c = log_softmax(a, b, 1, OBJECTIVE, lambda *parts: seen.append(parts))
    (0 * c).sum().backward()
    assert seen == []
    assert (a.grad == 0).all()


@reductions
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_reported_numbers_are_means_over_valid_rows(reduction: str, weighted: bool, smoothing: float) -> None:
    (a, b), target = pair(3, C), torch.tensor([1, -100, 3])
    how = {"weight": draw(C, seed=3).abs() if weighted else None, "label_smoothing": smoothing}
    terms = cross_entropy(a, b, target, OBJECTIVE, reduction=reduction, **how)
    summed = cross_entropy(a, b, target, Objective(ALPHA, sums_kl=True), reduction=reduction, **how)
    _, ce, kl = expected(a, b, target, reduction="mean", **how)
    torch.testing.assert_close((terms.ce, terms.kl), (ce, kl))
    torch.testing.assert_close((summed.ce, summed.kl), (ce, symmetric(a, b)[[0, 2]].mean().detach()))


@reductions
def test_reported_numbers_of_elements_are_means(reduction: str) -> None:
    (a, b), y = pair(4, 3), draw(4, 3, seed=2)
    how = {"weight": draw(4, 3, seed=3).abs()}
    for make_loss in (
        lambda **kw: mse_loss(a, b, y, y, OBJECTIVE, **how, **kw),
        lambda **kw: divergence.binary_cross_entropy_with_logits(a, b, y.sigmoid(), OBJECTIVE, **how, **kw),
        lambda **kw: divergence.binary_cross_entropy(a.sigmoid(), b.sigmoid(), y.sigmoid(), OBJECTIVE, **how, **kw),
    ):
        torch.testing.assert_close(make_loss(reduction=reduction)[1:], make_loss(reduction="mean")[1:])


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_compiled_is_one_graph_with_the_same_gradient() -> None:
    (a, b), target = pair(3, C), classes((3, C))
    compiled = torch.compile(
        lambda x, y: cross_entropy(x, y, target, OBJECTIVE).loss, backend="aot_eager", fullgraph=True
    )
    loss, want = compiled(a, b), expected(a, b, target, reduction="mean")[0]
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, (a, b)), torch.autograd.grad(want, (a, b)))
