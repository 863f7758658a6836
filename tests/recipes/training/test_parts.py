"""The parts of a run, each by itself."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from rehead.checkpoints.stream import ResourceError
from rehead.errors import UnsupportedError, UsageError
from rehead.options import flag_of, parse_count
from rehead.recipes.training import identity
from rehead.recipes.training.balance import LIMIT, measure, warn_if_unbalanced
from rehead.recipes.training.checkpoints import read_tensors, write_tensors
from rehead.recipes.training.log import RunLog
from rehead.recipes.training.models import open_checkpoint, prove_isolation, set_attention
from rehead.recipes.training.optimizer import Optimizer, Weights, choose, parameter_groups, rate_factor
from rehead.recipes.training.options import UptrainOptions


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8M", 8_000_000),
        ("32k", 32_000),
        ("32Ki", 32_768),
        ("1.5b", 1_500_000_000),
        ("2T", 2 * 10**12),
        ("7", 7),
        (9, 9),
    ],
)
def test_sizes(text: str | int, number: int) -> None:
    assert parse_count(text) == number
    assert UptrainOptions.parse({"data": "a", "tokens": text}).tokens == number


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tokns": 5}, "did you mean 'tokens'"),
        ({"tokens": "8X"}, "--tokens '8X'"),
        ({"tokens": 0}, "--tokens 0"),
        ({"seq_length": 1}, "--seq-length 1"),
        ({"learning_rate": -1.0}, "--lr -1.0"),
        ({"learning_rates": ["k_proj"]}, "is not PATTERN=FACTOR"),
        ({"learning_rates": ["k_(=2"]}, "no regular expression"),
        ({"schedule": "linear"}, "--schedule 'linear'"),
        ({"warmup": 2.5}, "neither a share below 1 nor a number of steps"),
        ({"betas": (0.9, 1.0)}, "must lie in"),
        ({"train": "attention,("}, "no regular expression"),
        ({"data": ()}, "name at least one text"),
        ({"tokens": "1.5"}, "--tokens '1.5': is not a whole number; write 8000000, 8M or 32Ki"),
        ({"learning_rate": float("inf")}, "finite"),
        ({"learning_rates": ["k_proj=-1"]}, "must be 0 or more"),
        ({"learning_rates": ["k_proj=nan"]}, "is not PATTERN=FACTOR"),
        ({"seed": -1}, "--seed -1"),
        ({"repeats": 1.5}, "--repeats 1.5: must be 1 or less"),
        ({"repeats": -0.1}, "--repeats"),
        ({"repeats": 0.5, "seq_length": 65}, "too short to repeat anything; give --seq-length 66 or more"),
        ({"seed": 1 << 70}, "--seed"),
        ({"warmup": 300, "tokens": 32768 * 8}, "is more than the run's 8 steps"),
    ],
)
def test_options_that_cannot_be_meant(values: dict, words: str) -> None:
    with pytest.raises(UsageError) as found:
        UptrainOptions.parse({"data": "a", **values})
    assert words in str(found.value)
    assert "\n" not in str(found.value)


def test_flags_recipe_keys_and_signature_are_one() -> None:
    import inspect

    from rehead.recipes import uptrain
    from rehead.recipes.training.commands import uptrain_command

    flags = {option for parameter in uptrain_command.params for option in parameter.opts}
    signature = inspect.signature(uptrain).parameters
    for name, entry in UptrainOptions.model_fields.items():
        assert flag_of(UptrainOptions, name) in flags
        assert signature[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert entry.description, name


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


@pytest.mark.parametrize("attention", ["tiled", "sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(tiny, attention: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.student)
    assert set_attention(model, attention, "tiny") == attention
    assert prove_isolation(model.float(), "tiny") < 1e-5


def test_a_model_that_leaks_across_documents_is_found(tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.student)

    def forget(module, args, kwargs):
        kwargs.pop("position_ids", None)
        return args, kwargs

    model.model.register_forward_pre_hook(forget, with_kwargs=True)
    with pytest.raises(UnsupportedError, match=r"packed documents see each other .* --packing joined"):
        prove_isolation(model, "tiny")


def test_a_document_alone_that_gives_no_numbers_proves_nothing(tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.student)

    def broken(module, args, kwargs, output):
        if kwargs.get("position_ids") is None:
            output.logits.fill_(torch.nan)

    model.register_forward_hook(broken, with_kwargs=True)
    with pytest.raises(UnsupportedError, match="packed documents see each other"):
        prove_isolation(model, "tiny")


def test_a_log_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"log.jsonl: cannot be written: No such file or directory"):
        RunLog(tmp_path / "gone" / "log.jsonl")


def _rescaled(tiny, out: Path, pair: tuple[str, str], factor: float) -> Path:
    """The student with one factor multiplied and the other divided: the same function, badly scaled."""
    weights = load_file(tiny.student / "model.safetensors")
    out.mkdir()
    for path in tiny.student.iterdir():
        if path.suffix == ".json" and path.name != "rehead.json":
            (out / path.name).write_bytes(path.read_bytes())
    for name in weights:
        if pair[0] in name:
            weights[name] = weights[name] * factor
        elif pair[1] in name:
            weights[name] = weights[name] / factor
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(("pair", "named"), [(("k_proj", "q_proj"), "k/q"), (("v_proj", "o_proj"), "v/o")])
def test_badly_scaled_factors_are_warned_of(tiny, tmp_path: Path, pair: tuple[str, str], named: str) -> None:
    teacher = open_checkpoint(str(tiny.teacher))
    planted = open_checkpoint(str(_rescaled(tiny, tmp_path / "planted", pair, 30.0)))
    told: list[str] = []
    found = warn_if_unbalanced(planted, teacher, told.append)
    assert found.factors == named
    assert found.ratio > 4 * LIMIT
    assert len(told) == 1
    assert f"norms of {named} are off by a factor of" in told[0]
    assert warn_if_unbalanced(open_checkpoint(str(tiny.student)), teacher, told.append) is None
    mild = open_checkpoint(str(_rescaled(tiny, tmp_path / "mild", pair, 2.0)))
    assert warn_if_unbalanced(mild, teacher, told.append) is None
    assert len(told) == 1


def test_one_badly_scaled_dimension_in_a_good_layer(tiny, tmp_path: Path) -> None:
    # Seen without a teacher as well, by the spread inside the layer.
    from rehead.models.model import open_model

    folder = _rescaled(tiny, tmp_path / "out", ("nothing", "nothing either"), 1.0)
    weights = load_file(folder / "model.safetensors")
    scale = torch.logspace(-4, 4, 8)
    weights["model.layers.1.self_attn.v_proj.weight"] *= scale[:, None]
    weights["model.layers.1.self_attn.o_proj.weight"] /= scale.repeat(4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for teacher in (None, open_model(str(tiny.teacher))):
        found = measure(open_model(str(folder)), teacher)
        assert (found.layer, found.factors) == (1, "v/o")
        assert found.ratio > LIMIT


def test_tensor_files_round_trip_and_refuse_others(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4, dtype=torch.bfloat16), "c": torch.zeros(0, 2)}
    size, sha = write_tensors(tmp_path / "t.safetensors", tensors)
    assert size == (tmp_path / "t.safetensors").stat().st_size
    assert len(sha) == 64
    loaded = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    into = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
    read_tensors(tmp_path / "t.safetensors", into)
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(UnsupportedError, match="d is only on one side"):
        read_tensors(tmp_path / "t.safetensors", {**into, "d": torch.zeros(1)})


def test_the_log_is_json_whatever_the_figures(tmp_path: Path) -> None:
    from rehead.recipes.training.log import RunLog

    log = RunLog(tmp_path / "log.jsonl")
    log.write("start", steps=3)
    position = log.position()
    log.write("step", loss=float("nan"), more=[float("inf"), 1.5])
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"event": "step", "loss": None, "more": [None, 1.5]}
    log.truncate(position)
    log.write("resume", step=0)
    log.close()
    events = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events == ["start", "resume"]


def test_code_that_decides_a_run_is_found_by_its_imports() -> None:
    """No list to forget: a change anywhere below training is another run."""
    root = Path(identity.__file__).parents[2]
    names = {path.relative_to(root).as_posix() for path in identity.imported_files([Path(identity.__file__)], root)}
    assert {"recipes/training/identity.py", "recipes/training/options.py", "options.py", "errors.py"} <= names
    whole = identity.imported_files(Path(identity.__file__).parent.rglob("*.py"), root)
    assert {root / "data/beginning.py", root / "data/store.py", root / "models/live.py"} <= set(whole)
    assert not [path for path in whole if path.is_relative_to(root / "tests")]


def test_imports_are_followed_whatever_the_clones_folder_is_called(tmp_path: Path) -> None:
    root = tmp_path / "some-clone"
    root.mkdir()
    (root / "one.py").write_text("from rehead import two\n")
    (root / "two.py").write_text("import rehead.three\n")
    (root / "three.py").write_text("import other.one\n")
    assert identity.imported_files([root / "one.py"], root) == [root / "one.py", root / "three.py", root / "two.py"]
