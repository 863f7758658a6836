"""Chunked losses against the same losses over whole logits in float64: values, gradients, metrics, memory."""

from __future__ import annotations

import pytest
import torch
from loss_reference import LOSSES, apart, head_side, plain_loss, whole
from torch import nn

from rehead.recipes.training.losses import chunked, parse_objective
from rehead.recipes.training.losses.chunked import Side, head_loss
from rehead.recipes.training.losses.head import Head, Shape

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "gemma2 cap": {"cap": 3.0, "size": 3.0},
    "granite scale": {"scale": 0.125, "size": 8.0},
    "all, padded": {"bias": True, "cap": 5.0, "scale": 0.5, "size": 4.0, "padding": 7},
}


def sides(tokens=23, width=16, vocabulary=61, dtype=torch.float64, teacher_dtype=None, **options):
    student = head_side(tokens, width, vocabulary, seed=0, dtype=dtype, **options)
    options.pop("padding", None)
    teacher = head_side(tokens, width + 8, vocabulary, seed=1, dtype=teacher_dtype or dtype, **options)
    teacher.hidden.requires_grad_(False)
    teacher.head.module.requires_grad_(False)
    labels = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(2))
    return student, teacher, labels


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_loss_over_whole_logits(loss, head, temperature) -> None:
    student, teacher, labels = sides(**HEADS[head])
    ours, leaves = whole(student)
    want = plain_loss(loss, ours, whole(teacher)[0], labels, temperature, 0.3)
    gradients = torch.autograd.grad(want, leaves)
    objective = parse_objective(loss, temperature=temperature, mix=0.3)
    got, metrics = head_loss(student, teacher, labels, objective, chunk=5)
    (got * 0.25).backward()
    assert apart(got, want) < 1e-12
    found = [student.hidden.grad, *(p.grad[:61] for p in student.head.module.parameters())]
    for a, b in zip(found, gradients):
        assert apart(a, 0.25 * b) < 1e-11
    assert not student.head.module.weight.grad[61:].any()
    plain = {
        "cross_entropy": nn.functional.cross_entropy(ours, labels, reduction="sum"),
        "kl": plain_loss("kd", ours, whole(teacher)[0], labels, 1.0, 0.5),
        "top1_agreement": (ours.argmax(-1) == whole(teacher)[0].argmax(-1)).sum().double(),
    }
    assert metrics.keys() == plain.keys()
    for name, value in plain.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-9, abs=1e-9), name
        assert not metrics[name].requires_grad


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_along_random_directions(loss) -> None:
    """Central differences in float64, which know nothing of how the gradient is derived."""
    student, teacher, labels = sides(**HEADS["all, padded"])
    objective = parse_objective(loss, temperature=1.5, mix=0.7)
    leaves = [student.hidden, *student.head.module.parameters()]
    gradients = torch.autograd.grad(head_loss(student, teacher, labels, objective, 7).loss, leaves)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        steps = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in leaves]
        values = []
        for sign in (1, -2, 1):
            with torch.no_grad():
                for leaf, step in zip(leaves, steps):
                    leaf += sign * 1e-5 * step
                values.append(float(head_loss(student, teacher, labels, objective, 7).loss))
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx(sum(float((g * s).sum()) for g, s in zip(gradients, steps)), rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "weights"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)]
)
def test_narrow_arithmetic_stays_near_float64(dtype, weights) -> None:
    student, teacher, labels = sides(300, 32, 500, dtype, size=4.0, weights=weights)
    ours, leaves = whole(student)
    # The products' operands are rounded to the narrow dtype, which is not the loss's doing.
    leaves_rounded = [leaf.detach().to(dtype).double().requires_grad_() for leaf in leaves]
    ours = leaves_rounded[0] @ leaves_rounded[1].T
    want = plain_loss("kd+0.1*ce", ours, whole(teacher)[0], labels, 1.0, 0.5)
    gradients = torch.autograd.grad(want, leaves_rounded)
    got, _ = head_loss(student, teacher, labels, parse_objective("kd+0.1*ce"), 64)
    got.backward()
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert got.dtype == torch.float32
    assert apart(got, want) < limit
    weight = student.head.module.weight
    assert weight.grad.dtype == weight.dtype
    assert apart(student.hidden.grad, gradients[0]) < limit
    assert apart(weight.grad, gradients[1]) < limit


def test_weight_gradient_does_not_get_worse_with_more_chunks() -> None:
    errors = []
    for chunk in (512, 16):
        student, teacher, labels = sides(512, 16, 50, torch.bfloat16)
        exact, leaves = whole(student)
        want = torch.autograd.grad(plain_loss("kd", exact, whole(teacher)[0], labels, 1.0, 0.5), leaves)[1]
        student.head.module.float()
        head_loss(student, teacher, labels, parse_objective("kd"), chunk).loss.backward()
        errors.append(apart(student.head.module.weight.grad, want))
    assert errors[1] < 1.2 * errors[0] < 0.02


def test_frozen_parts_cost_and_get_no_gradient() -> None:
    student, teacher, labels = sides()
    student.head.module.requires_grad_(False)
    head_loss(student, teacher, labels, parse_objective("kd"), 5).loss.backward()
    assert student.head.module.weight.grad is None
    assert student.hidden.grad is not None
    student, teacher, labels = sides()
    student.hidden.requires_grad_(False)
    head_loss(student, teacher, labels, parse_objective("kd"), 5).loss.backward()
    assert student.hidden.grad is None
    assert student.head.module.weight.grad is not None
    with torch.no_grad():
        assert not head_loss(student, teacher, labels, parse_objective("kd"), 5).loss.requires_grad


def test_a_head_that_is_a_module_gives_the_same() -> None:
    student, teacher, labels = sides(**HEADS["gemma2 cap"])
    objective = parse_objective("kd+ce")
    want, metrics = head_loss(student, teacher, labels, objective, 5)
    want.backward()
    wanted = [student.hidden.grad.clone(), student.head.module.weight.grad.clone()]
    student.hidden.grad = student.head.module.weight.grad = None
    for ours, theirs in ((False, True), (False, False), (True, False)):
        parts = [
            Side(
                side.hidden,
                Head(nn.Sequential(side.head.module) if not linear else side.head.module, side.head.shape, linear),
            )
            for side, linear in ((student, ours), (teacher, theirs))
        ]
        got, found = head_loss(*parts, labels, objective, 5)
        got.backward()
        assert apart(got, want) < 1e-12
        assert found["kl"].item() == pytest.approx(metrics["kl"].item())
        assert apart(student.hidden.grad, wanted[0]) < 1e-12
        assert apart(student.head.module.weight.grad, wanted[1]) < 1e-12
        student.hidden.grad = student.head.module.weight.grad = None


def test_a_model_has_no_distance_from_itself() -> None:
    student, _, labels = sides(size=5.0)
    teacher = Side(student.hidden.detach(), student.head)
    for loss in ("kd", "js"):
        got, metrics = head_loss(student, teacher, labels, parse_objective(loss), 5)
        assert abs(got.item()) < 1e-12
        assert metrics["top1_agreement"].item() == len(labels)


def test_no_token_counted() -> None:
    student, teacher, labels = sides(tokens=1)
    student = Side(student.hidden[:0], student.head)
    got, metrics = head_loss(student, Side(teacher.hidden[:0], teacher.head), labels[:0], parse_objective("kd"), 5)
    got.backward()
    assert got.item() == 0
    assert metrics["kl"].item() == 0
    assert not student.head.module.weight.grad.any()


def test_backward_twice_is_refused_rather_than_wrong() -> None:
    student, teacher, labels = sides()
    got = head_loss(student, teacher, labels, parse_objective("kd"), 5).loss
    got.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="goes backward once"):
        got.backward()


def test_whole_logits_are_never_there(monkeypatch) -> None:
    """The largest tensor that is made anywhere is a chunk's, or a parameter's gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for item in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(item, torch.Tensor):
                    Largest.elements = max(Largest.elements, item.numel())
            return out

    student, teacher, labels = sides(512, 8, 400)
    with Largest():
        head_loss(student, teacher, labels, parse_objective("kd+ce+js"), 16).loss.backward()
    assert Largest.elements <= 16 * 400


def test_chunks_fit_their_budget() -> None:
    for device in ("cpu", "cuda"):
        for vocabulary in (1000, 49152, 262144):
            size = chunked.chunk_size(vocabulary, 2, torch.device(device))
            least = {"cpu": 16, "cuda": 128}[device]
            assert size % least == 0
            assert size == least or size * vocabulary * 2 <= chunked._LOGITS_BYTES[device]


def test_shape_applies_scale_before_cap() -> None:
    raw = torch.linspace(-50, 50, 11, dtype=torch.float64)
    want = 5.0 * torch.tanh(0.5 * raw / 5.0)
    assert torch.equal(Shape(11, 0.5, 5.0).apply(raw), want)
