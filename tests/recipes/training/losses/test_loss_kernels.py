"""The fused kernel against float64: on a GPU, and elsewhere in Triton's interpreter (test_loss_interpreter.py)."""

from __future__ import annotations

import os

import pytest
import torch
from loss_reference import LOSSES, apart, head_side, plain_loss, whole

from rehead.attention.kernels import unavailable
from rehead.recipes.training.losses import fused, parse_objective
from rehead.recipes.training.losses.chunked import head_loss
from rehead.recipes.training.losses.head import Shape

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
pytestmark = [
    pytest.mark.skipif(unavailable(torch.device(DEVICE)) is not None, reason="needs a GPU, or the interpreter"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
# Blocks of 64 columns in the interpreter and of 4096 on a GPU; the last is not whole.
SIZES = [(97, 1.0), (128, 0.5)] if INTERPRETED else [(97, 1.0), (4096, 0.5), (4097, 2.0), (9000, 1.0)]
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 6e-3, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", list(LIMIT)[: 2 if INTERPRETED else 3])
@pytest.mark.parametrize(("vocabulary", "temperature"), SIZES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shaped", [False, True])
def test_kernel(loss, vocabulary, temperature, dtype, shaped) -> None:
    tokens = 3
    generator = torch.Generator().manual_seed(vocabulary)
    raw = (4 * torch.randn(tokens, vocabulary, generator=generator)).to(DEVICE, dtype)
    other = raw + torch.randn(tokens, vocabulary, generator=generator).to(DEVICE, dtype)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator).to(DEVICE)
    labels[0], labels[1] = 0, vocabulary - 1
    bias = [torch.randn(vocabulary, generator=generator).to(DEVICE, dtype) if shaped else None for _ in range(2)]
    shapes = [Shape(vocabulary, 0.7, 5.0), Shape(vocabulary, 1.3, 8.0)] if shaped else [Shape(vocabulary)] * 2
    objective = parse_objective(loss, temperature=temperature, mix=0.3)
    needed = objective.needs_teacher

    leaf = raw.double().requires_grad_()
    logits = [
        shape.apply(z if b is None else z + b.double()) for z, b, shape in zip((leaf, other.double()), bias, shapes)
    ]
    want = plain_loss(loss, logits[0], logits[1], labels, temperature, 0.3)
    gradient = torch.autograd.grad(want, leaf)[0]
    arguments = (labels, objective, (shapes[0], shapes[1] if needed else None), (bias[0], bias[1] if needed else None))
    before = raw.clone()
    rows = fused.token_losses(raw, other if needed else None, *arguments, False)
    assert torch.equal(raw, before), "without a gradient the logits stay as they are"
    again = fused.token_losses(raw, other if needed else None, *arguments, True)
    # The two are compiled apart, so a sum may be contracted differently: the last bit of float32, no more.
    torch.testing.assert_close(again, rows, rtol=1e-6, atol=1e-6)
    assert apart(rows[0].sum(), want) < 1e-4
    assert apart(raw, gradient) < LIMIT[dtype]
    assert apart(rows[2].sum(), torch.nn.functional.cross_entropy(logits[0], labels, reduction="sum")) < 1e-4
    if needed:
        assert apart(rows[1].sum(), plain_loss("kd", *logits, labels, 1.0, 0.5)) < 1e-4
        assert torch.equal(rows[3] > 0.5, logits[0].argmax(-1) == logits[1].argmax(-1))


@pytest.mark.parametrize("vocabulary", [97, 128])
def test_rows_with_room(vocabulary) -> None:
    """Columns beyond the vocabulary, whatever is in them, change nothing; without room they are not touched."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 24, generator=generator).to(DEVICE) for n in (3, vocabulary))
    roomy = fused.roomy_product(hidden, weight)
    assert roomy.stride(0) % 16 == 0
    torch.testing.assert_close(roomy, hidden @ weight.T)
    if vocabulary % 16:
        torch.as_strided(roomy, (3, 112), (112, 1))[:, vocabulary:] = float("nan")
    labels = torch.tensor([0, 5, vocabulary - 1], device=DEVICE)
    objective, shapes = parse_objective("kd+ce"), (Shape(vocabulary), Shape(vocabulary))
    tight, around = (hidden @ weight.T).contiguous(), torch.full((3 * vocabulary + 20,), 7.0, device=DEVICE)
    around[: 3 * vocabulary] = tight.flatten()
    inner = around[: 3 * vocabulary].view(3, vocabulary)
    want = fused.token_losses(tight, inner.clone(), labels, objective, shapes, (None, None), True)
    got = fused.token_losses(roomy, roomy.clone(), labels, objective, shapes, (None, None), True)
    again = fused.token_losses(inner, inner.clone(), labels, objective, shapes, (None, None), True)
    for rows, logits in ((got, roomy), (again, inner)):
        torch.testing.assert_close(rows, want)
        torch.testing.assert_close(logits, tight)
    assert (around[3 * vocabulary :] == 7).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("loss", ["ce", LOSSES[-1]])
def test_maxima_that_move_from_block_to_block(loss, temperature) -> None:
    """Rows that rise and rows that fall: what was summed before is rescaled in every block, or in none."""
    vocabulary = 150 if INTERPRETED else 9000
    rising = torch.linspace(-9, 9, vocabulary, device=DEVICE)
    raw = torch.stack([rising, rising, -rising, -rising])
    other = torch.stack([0.5 * rising, -0.5 * rising, 0.5 * rising, -rising])
    labels = torch.tensor([0, 5, vocabulary - 1, 70], device=DEVICE)
    leaf = raw.double().requires_grad_()
    want = plain_loss(loss, leaf, other.double(), labels, temperature, 0.3)
    gradient = torch.autograd.grad(want, leaf)[0]
    shapes = (Shape(vocabulary), Shape(vocabulary))
    objective = parse_objective(loss, temperature=temperature, mix=0.3)
    rows = fused.token_losses(raw, other, labels, objective, shapes, (None, None), True)
    assert apart(rows[0].sum(), want) < 1e-4
    assert apart(raw, gradient) < 1e-4


def test_tops_agree_where_they_are_the_same_token() -> None:
    """Not the same column of another block; of equal logits the first counts, as in argmax."""
    student, teacher = torch.zeros(2, 5, 150, device=DEVICE)
    for token, (ours, theirs) in enumerate([(70, 70), (6, 70), (70, 6), (40, 40), (140, 12)]):
        student[token, ours] = teacher[token, theirs] = 3.0
    student[3, 149] = 3.0
    teacher[3, 145] = 3.0
    shapes = (Shape(150), Shape(150))
    labels = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    rows = fused.token_losses(student, teacher, labels, parse_objective("kd"), shapes, (None, None), False)
    assert rows[3].tolist() == [1, 0, 0, 1, 0]


def test_labels_and_biases_need_not_be_contiguous() -> None:
    generator = torch.Generator().manual_seed(0)
    raw, other = (torch.randn(3, 70, generator=generator).to(DEVICE) for _ in range(2))
    bias, other_bias = torch.randn(70, 2, generator=generator).to(DEVICE).unbind(1)
    labels = torch.tensor([[4, 0], [69, 0], [30, 0]], device=DEVICE)[:, 0]
    want = plain_loss("kd+ce", (raw + bias).double(), (other + other_bias).double(), labels, 1.0, 0.5)
    biases, shapes = (bias, other_bias), (Shape(70), Shape(70))
    rows = fused.token_losses(raw, other, labels, parse_objective("kd+ce"), shapes, biases, False)
    assert apart(rows[0].sum(), want) < 1e-5


def test_extreme_logits() -> None:
    """Logits beyond what exp can hold: softmax statistics stay finite, and so does everything made of them."""
    raw = torch.tensor([[3e4, -3e4, 0.0, 1.0] * 8, [-3e4] * 31 + [3e4]], device=DEVICE)
    other = raw.flip(1).contiguous() * 0.5
    labels = torch.tensor([1, 0], device=DEVICE)
    rows = fused.token_losses(
        raw, other, labels, parse_objective("kd+ce+js"), (Shape(32), Shape(32)), (None, None), True
    )
    assert torch.isfinite(rows).all()
    assert torch.isfinite(raw).all()


@pytest.mark.parametrize("weights", [None, torch.float32])
@pytest.mark.parametrize("padding", [0, 9])
def test_head_loss_through_the_kernel(padding, weights) -> None:
    dtype = torch.bfloat16
    student = head_side(70, 32, 300, seed=0, dtype=dtype, device=DEVICE, padding=padding, weights=weights, size=4.0)
    teacher = head_side(70, 40, 300, seed=1, dtype=dtype, device=DEVICE, size=4.0)
    teacher.hidden.requires_grad_(False)
    labels = torch.randint(0, 300, (70,), device=DEVICE)
    objective = parse_objective("kd+0.1*ce")
    assert fused.unavailable(objective, student.hidden.device, dtype) is None
    _, leaves = whole(student)
    leaves = [leaf.detach().to(dtype).double().requires_grad_() for leaf in leaves]
    want = plain_loss("kd+0.1*ce", leaves[0] @ leaves[1].T, whole(teacher)[0], labels.cpu(), 1.0, 0.5)
    gradients = torch.autograd.grad(want, leaves)
    got, _ = head_loss(student, teacher, labels, objective, 32)
    got.backward()
    assert apart(got, want) < 1e-2
    assert apart(student.hidden.grad, gradients[0]) < 2e-2
    assert apart(student.head.module.weight.grad[:300], gradients[1]) < 2e-2


def test_what_has_no_kernel_says_so() -> None:
    device = torch.device(DEVICE)
    assert "float64" in fused.unavailable(parse_objective("kd"), device, torch.float64)
    assert fused.unavailable(parse_objective("kd+ce"), device, torch.bfloat16) is None
