"""Student, teacher and loss in one module, against whole logits of the models themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rehead.benchmarks.tiny import tiny_model
from rehead.errors import UsageError
from rehead.recipes.training.losses import StudentWithLoss

VOCABULARY = 128


def model(seed: int, **options):
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(shape | options)))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (3, 11), generator=generator)
    labels = torch.randint(0, VOCABULARY, (3, 11), generator=generator)
    labels[0, 4], labels[2, 10] = -100, -100
    return {"input_ids": ids, "labels": labels}


def plain_kl(student, teacher, ids, labels):
    counted = labels != -100
    ours = student(input_ids=ids).logits[counted].double().log_softmax(-1)
    theirs = teacher(input_ids=ids).logits[counted].double().log_softmax(-1)
    return nn.functional.kl_div(ours, theirs.detach(), log_target=True, reduction="sum"), ours, labels[counted]


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_every_parameter(batch, tied) -> None:
    student, teacher = model(0, tie_word_embeddings=tied).double(), model(1).double()
    want, ours, labels = plain_kl(student, teacher, **{"ids": batch["input_ids"], "labels": batch["labels"]})
    names, parameters = zip(*student.named_parameters())
    gradients = torch.autograd.grad(want, parameters)
    out = StudentWithLoss(student, teacher, "kd", chunk=4)(**batch)
    out.loss_sum.backward()
    assert out.counted.item() == 31
    assert out.loss_sum.item() == pytest.approx(want.item(), rel=1e-9)
    assert out.metrics["kl"].item() == pytest.approx(want.item(), rel=1e-9)
    expected = nn.functional.nll_loss(ours, labels, reduction="sum").item()
    assert out.metrics["cross_entropy"].item() == pytest.approx(expected, rel=1e-9)
    for name, parameter, gradient in zip(names, parameters, gradients):
        assert float((parameter.grad - gradient).norm() / gradient.norm()) < 1e-9, name


def test_cross_entropy_is_that_of_transformers(batch) -> None:
    """Labels here are already shifted; transformers shifts them itself."""
    student = model(0)
    ids = batch["input_ids"]
    shifted = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], 1)
    out = StudentWithLoss(student, None, "ce")(ids, shifted)
    assert set(out.metrics) == {"cross_entropy"}
    assert out.loss_sum.item() / out.counted.item() == pytest.approx(
        student(input_ids=ids, labels=ids).loss.item(), rel=1e-5
    )


def test_counted_index_given_or_found(batch) -> None:
    module = StudentWithLoss(model(0), model(1), "kd")
    index = (batch["labels"].flatten() != -100).nonzero().squeeze(-1)
    assert module(**batch).loss_sum.item() == module(**batch, counted_index=index).loss_sum.item()


def test_packed_documents_do_not_see_each_other(batch) -> None:
    module = StudentWithLoss(model(0), model(1), "kd")
    ids, labels = batch["input_ids"], torch.full((3, 11), -100)
    labels[:, 6:] = batch["labels"][:, 6:].clamp_min(0)
    positions = torch.cat([torch.arange(6), torch.arange(5)]).expand(3, -1)
    changed = ids.clone()
    changed[:, :6] = (changed[:, :6] + 1) % VOCABULARY
    together = module(ids, labels, positions)
    assert together.loss_sum.item() == pytest.approx(module(changed, labels, positions).loss_sum.item(), rel=1e-5)
    alone = module(ids[:, 6:], labels[:, 6:])
    assert together.loss_sum.item() == pytest.approx(alone.loss_sum.item(), rel=1e-5)
    assert module(ids, labels).loss_sum.item() != pytest.approx(alone.loss_sum.item(), rel=1e-3)


def test_the_teacher_is_no_part_of_the_module(batch) -> None:
    student, teacher = model(0), model(1).train()
    module = StudentWithLoss(student, teacher, "kd")
    assert module.teacher is teacher
    assert {name.split(".")[0] for name in module.state_dict()} == {"student"}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training
    module.train()
    assert not teacher.training
    module(**batch).loss_sum.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert module._no_split_modules == ["LlamaDecoderLayer"]


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_and_autocast(batch, autocast) -> None:
    student, teacher = model(0), model(1)
    exact = StudentWithLoss(student, teacher, "kd")(**batch).loss_sum.item()
    if not autocast:
        student.bfloat16()
    module = StudentWithLoss(student, teacher.bfloat16(), "kd")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = module(**batch)
    out.loss_sum.backward()
    assert out.loss_sum.dtype == torch.float32
    assert out.loss_sum.item() == pytest.approx(exact, rel=0.05)
    assert student.lm_head.weight.grad.dtype == (torch.float32 if autocast else torch.bfloat16)


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "cohere", "phi", "gpt2"])
def test_architectures(model_type, batch) -> None:
    options = {"granite": {"logits_scaling": 8.0}, "cohere": {"logit_scale": 0.5}}.get(model_type, {})
    student, teacher = tiny_model(model_type, **options), tiny_model(model_type, **options)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    want, _, _ = plain_kl(student.eval(), teacher.eval(), batch["input_ids"], batch["labels"])
    out = StudentWithLoss(student, teacher, "kd", chunk=8)(**batch)
    assert out.loss_sum.item() == pytest.approx(want.item(), rel=1e-4)


def test_a_padded_vocabulary() -> None:
    """A teacher padded further than the student is compared on what both have."""
    student, teacher = model(0), model(1, vocab_size=VOCABULARY + 16)
    with pytest.raises(UsageError, match="128 and 144"):
        StudentWithLoss(student, teacher, "kd")
    with pytest.raises(UsageError, match="only 128"):
        StudentWithLoss(student, teacher, "kd", vocabulary=144)
    ids = torch.randint(0, 120, (2, 9), generator=torch.Generator().manual_seed(0))
    out = StudentWithLoss(student, teacher, "kd", vocabulary=120)(ids, ids)
    ours, theirs = (
        m(input_ids=ids).logits[..., :120].double().log_softmax(-1).flatten(0, 1) for m in (student, teacher)
    )
    want = nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")
    assert out.loss_sum.item() == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StudentWithLoss(model(0), None, "kd"), "needs a teacher"),
        (lambda: StudentWithLoss(model(0), None, "ce", chunk=0), "chunk 0"),
    ],
)
def test_what_does_not_fit_is_one_line(make, words) -> None:
    with pytest.raises(UsageError, match=r"^[^\n]+$") as raised:
        make()
    assert words in str(raised.value)


def test_a_teacher_in_evaluation_completes_cross_entropy(batch) -> None:
    with torch.no_grad():
        out = StudentWithLoss(model(0), model(1), "ce")(**batch)
    assert set(out.metrics) == {"cross_entropy", "kl", "top1_agreement"}
    assert out.loss_sum.item() == out.metrics["cross_entropy"].item()
