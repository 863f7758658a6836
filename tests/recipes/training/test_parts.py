"""The parts of a run, each by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rehead.checkpoints.stream import ResourceError
from rehead.counts import parse_count
from rehead.errors import UnsupportedError, UsageError
from rehead.options import flag_of
from rehead.recipes.training import identity
from rehead.recipes.training.balance import LIMIT, measure, warn_if_unbalanced
from rehead.recipes.training.checkpoints import read_tensors, write_tensors
from rehead.recipes.training.log import RunLog
from rehead.recipes.training.models import open_checkpoint, prove_isolation, set_attention
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
