"""What trains and how it moves: rates over the steps, float32 masters, steps that do not count, moments in 8 bits."""

from __future__ import annotations

import math
import shutil
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from rehead.errors import UsageError
from rehead.recipes.training.optimizer import Optimizer, Weights, choose, parameter_groups, rate_factor
from rehead.recipes.training.options import UptrainOptions


@given(
    steps=st.integers(1, 300), schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    warmup=st.one_of(st.floats(0, 0.99), st.integers(1, 50).map(float)), end=st.floats(0, 1),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_schedules_rise_and_fall(steps: int, schedule: str, warmup: float, end: float) -> None:
    warmup = min(warmup, steps)
    options = UptrainOptions.parse({
        "data": "a", "tokens": steps * 8, "batch_tokens": 8, "seq_length": 8, "schedule": schedule, "warmup": warmup,
        "final_learning_rate": end,
    })  # fmt: skip
    assert options.steps == steps
    factors = [rate_factor(step, options) for step in range(steps)]
    rise = int(warmup) if warmup >= 1 else round(warmup * steps)
    assert all(0 < factor <= 1 for factor in factors) or end == 0
    assert factors[: min(rise, steps)] == sorted(factors[: min(rise, steps)])
    assert factors[rise:] == sorted(factors[rise:], reverse=True)
    if rise < steps and schedule != "constant":
        assert factors[-1] - end <= (1 - end) * 1.0
        assert factors[rise] == pytest.approx(1.0, abs=1e-9) or schedule == "wsd"


def test_cosine_is_the_formula_of_what_is_left_after_the_warm_up() -> None:
    options = UptrainOptions.parse({"data": "a", "tokens": 80, "batch_tokens": 8, "seq_length": 8, "warmup": 2,
                            "final_learning_rate": 0.1})  # fmt: skip
    factors = [rate_factor(step, options) for step in range(10)]
    after = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert factors == pytest.approx([0.5, 1.0, *after])
    assert factors[6] == pytest.approx(0.55)


def test_wsd_is_flat_then_linear() -> None:
    options = UptrainOptions.parse({"data": "a", "tokens": 800, "batch_tokens": 8, "seq_length": 8, "schedule": "wsd",
                            "warmup": 10, "decay": 0.2})  # fmt: skip
    factors = [rate_factor(step, options) for step in range(100)]
    assert factors[10:80] == [1.0] * 70
    assert factors[80:] == pytest.approx([(20 - i) / 20 for i in range(20)])


def test_a_parameter_without_a_part_in_a_step_has_a_gradient_of_zero() -> None:
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)]).to(torch.bfloat16)
    weights = Weights(dict(model.named_parameters()))
    for _ in range(2):
        model[0](torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        weights.collect()
    used, unused = weights.gradients()
    assert used.dtype == torch.float32
    assert torch.equal(used, torch.full((4, 4), 2.0))
    assert not unused.any()


def test_small_updates_are_not_lost_to_rounding() -> None:
    # 1 + 1e-4 rounds to 1 in bfloat16; the float32 master remembers and the copy follows once it adds up.
    model = nn.Linear(8, 8, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    weights = Weights({"weight": model.weight})
    options = UptrainOptions.parse({"data": "a", "learning_rate": 1e-4, "clip": 0.0})
    optimizer = Optimizer(weights, options)
    for step in range(100):
        for _ in range(2):  # micro-batches
            model(torch.ones(1, 8, dtype=torch.bfloat16)).float().sum().backward()
            weights.collect()
        assert weights.tensors["weight"].grad.dtype == torch.float32
        assert torch.equal(weights.tensors["weight"].grad, torch.full((8, 8), 2.0))
        optimizer.step(1.0, torch.zeros(()))
        if step == 0:
            assert torch.equal(model.weight, torch.ones(8, 8, dtype=torch.bfloat16))
    assert weights.tensors["weight"].mean() == pytest.approx(0.99, abs=1e-4)
    assert torch.equal(model.weight, weights.tensors["weight"].to(torch.bfloat16))


def test_a_step_that_is_not_finite_moves_nothing() -> None:
    parameter = nn.Parameter(torch.ones(4, 4))
    optimizer = Optimizer(Weights({"w": parameter}), UptrainOptions.parse({"data": "a"}))
    for loss, gradient in ((1.0, float("nan")), (float("inf"), 1.0)):
        parameter.grad = torch.full((4, 4), gradient)
        optimizer.step(1.0, torch.tensor(loss))
        assert torch.equal(parameter, torch.ones(4, 4))
        assert not any(moment.any() for moment in optimizer.state().values())
    parameter.grad = torch.ones(4, 4)
    assert optimizer.step(1.0, torch.tensor(1.0)) == 4.0
    assert not torch.equal(parameter, torch.ones(4, 4))


def test_a_fused_step_that_is_not_finite_moves_nothing_ever_after() -> None:
    # Where the host does not wait for the norm, the next step is already under way: it must not move anything either.
    parameter = nn.Parameter(torch.ones(4, 4))
    optimizer = Optimizer(Weights({"w": parameter}), UptrainOptions.parse({"data": "a"}), fused=True)
    assert not optimizer.waits
    parameter.grad = torch.ones(4, 4)
    optimizer.step(1.0, torch.tensor(1.0))
    moved = parameter.detach().clone()
    state = {name: moment.clone() for name, moment in optimizer.state().items()}
    for gradient in (float("nan"), 1.0):
        parameter.grad = torch.full((4, 4), gradient)
        optimizer.step(1.0, torch.tensor(1.0))
        assert torch.equal(parameter, moved)
        assert all(torch.equal(moment, state[name]) for name, moment in optimizer.state().items())
    assert not torch.equal(moved, torch.ones(4, 4))


@pytest.fixture
def eight_bit_options() -> UptrainOptions:
    pytest.importorskip("torchao")
    if shutil.which("cc") is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        pytest.skip("its steps are compiled, which needs a C compiler")
    return UptrainOptions.parse({"data": "a", "optimizer": "adamw-8bit", "learning_rate": 1e-2, "clip": 0.0})


def test_moments_in_eight_bits_follow_adamw_and_are_restored(eight_bit_options) -> None:
    options, draw = eight_bit_options, torch.Generator().manual_seed(0)
    start = torch.randn(32, 256, generator=draw)
    gradients = [torch.randn(32, 256, generator=draw) for _ in range(6)]

    def stepped(optimizer: Optimizer, parameter: nn.Parameter, some: list[torch.Tensor]) -> torch.Tensor:
        for gradient in some:
            parameter.grad = gradient.clone()
            optimizer.step(0.5, torch.zeros(()))
        return parameter.detach().clone()

    def made(options: UptrainOptions, value: torch.Tensor) -> tuple[Optimizer, nn.Parameter]:
        parameter = nn.Parameter(value.clone())
        return Optimizer(Weights({"w": parameter}), options), parameter

    optimizer, parameter = made(options, start)
    assert torch.equal(parameter, start)
    moments = optimizer.state()
    assert {name: tensor.dtype for name, tensor in moments.items()} == {
        "w.exp_avg.codes": torch.uint8,
        "w.exp_avg.scale": torch.float32,
        "w.exp_avg_sq.codes": torch.uint8,
        "w.exp_avg_sq.scale": torch.float32,
    }
    assert sum(tensor.nbytes for tensor in moments.values()) < 2.1 * start.numel()
    halfway = stepped(optimizer, parameter, gradients[:3])
    kept = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    through = stepped(optimizer, parameter, gradients[3:])
    exact = stepped(*made(options.model_copy(update={"optimizer": "adamw"}), start), gradients)
    assert 0 < (through - exact).abs().max() < 0.2 * (exact - start).abs().max()

    resumed, parameter = made(options, halfway)
    for name, tensor in resumed.state().items():
        tensor.copy_(kept[name])
    resumed.set_step(3)
    assert torch.equal(stepped(resumed, parameter, gradients[3:]), through)


def test_eight_bits_without_torchao_say_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    options = UptrainOptions.parse({"data": "a", "optimizer": "adamw-8bit"})
    with pytest.raises(UsageError, match=r"needs torchao; run pip install \"rehead\[8bit\]\""):
        Optimizer(Weights({"w": nn.Parameter(torch.ones(4, 4))}), options)


def test_gradients_are_clipped_by_their_norm() -> None:
    parameters = {"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(4, 1))}
    optimizer = Optimizer(Weights(parameters), UptrainOptions.parse({"data": "a", "clip": 2.0, "betas": (0.0, 0.0)}))
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 10.0)
    assert optimizer.step(1.0, torch.zeros(())) == pytest.approx(10 * math.sqrt(7))
    found = torch.cat([state.flatten() for name, state in optimizer.state().items() if name.endswith("exp_avg")])
    assert found.norm() == pytest.approx(2.0, rel=1e-4)


def test_choosing_what_trains(tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.student)
    everything = choose(model, "all")
    assert len(everything) == len(list(model.parameters()))
    attention = choose(model, "attention")
    assert len(attention) == 8
    assert all("self_attn" in name for name in attention)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == attention
    both = choose(model, r"attention, layers\.0\.mlp")
    assert len(both) == 11
    assert {name.split(".")[-2] for name in choose(model, "norms")} == {
        "input_layernorm", "post_attention_layernorm", "norm",
    }  # fmt: skip
    with pytest.raises(UsageError, match="did you mean 'attention'"):
        choose(model, "atention")
    groups = parameter_groups(dict(model.named_parameters()), 1e-3, {r"k_proj": 2.0, r"_proj": 0.5}, 0.1)
    rates = {name: (group["peak"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert rates["model.layers.0.self_attn.k_proj.weight"] == (2e-3, 0.1)
    assert rates["model.layers.1.mlp.up_proj.weight"] == (5e-4, 0.1)
    assert rates["model.norm.weight"] == (1e-3, 0.0)
    with pytest.raises(UsageError, match="--lr-for typo"):
        parameter_groups(dict(model.named_parameters()), 1e-3, {"typo": 2.0}, 0.0)
