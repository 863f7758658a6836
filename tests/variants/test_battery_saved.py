"""One battery for every variant that a checkpoint can hold, from its easiest options to its hardest.

A new variant adds its rows to :data:`ROWS`; nothing else here names one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny import IDS, loaded, logits
from transformers import AutoConfig

from rehead.checkpoints.target import Target
from rehead.convert import convert, plan, verify
from rehead.convert.commands import convert_command, plan_command, variants_command
from rehead.errors import UnsupportedError, UsageError
from rehead.models.cache_layouts import config_layouts
from rehead.models.model import open_model
from rehead.models.modeling.modeling_rehead_cache import returned_cache
from rehead.patches import live_names, patch_model
from rehead.variants.contract import VARIANTS

CALIBRATION: dict[str, Any] = {"calibration": ["random"], "calibration_tokens": 1024, "calibration_length": 32}


@dataclass(frozen=True)
class Row:
    """One variant under some options.

    Attributes:
        options: as they are written behind its name.
        models: tiny models that it is given to.
        recovery: options of a conversion that recovers some of what it costs.
    """

    variant: str
    options: dict[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ("llama", "qwen3", "phi3")
    recovery: dict[str, Any] = field(default_factory=lambda: {"refit": True, "fit": 3})

    def __str__(self) -> str:
        return self.text.replace("=", "-")

    @property
    def text(self) -> str:
        """As users write it."""
        return f"{self.variant}:" + ",".join(f"{name}={value}" for name, value in self.options.items())


ROWS = (
    Row("temperature", {"start": 1.25}, ("llama", "qwen3", "phi3", "gemma3_text")),
    Row("temperature", {"start": 0.8, "layers": "1"}, ("llama", "cohere")),
    Row("pool", {"num_key_value_heads": 2}),
    Row("pool", {"num_key_value_heads": 1, "method": "procrustes"}),
    Row("uneven", {"num_key_value_heads": 3, "layers": "1"}, ("llama", "qwen2"), {"refit": True}),
    Row("prune", {"by": "weights"}, ("llama", "qwen3", "phi3", "gemma3_text")),
    Row("prune", {"by": "weights", "layers": "1"}, ("llama", "qwen2")),
    Row("latent", {"rank": 24, "rope_dims": 8}, ("llama", "qwen2", "qwen3")),
    Row("window", {"size": 5, "layers": "1"}, ("llama",)),
    Row("window", {"size": 8, "layers": "1"}, ("gemma2",)),
    Row("window", {"size": 5, "sinks": 2}, ("llama",)),
    Row("window", {"size": 6}, ("qwen3", "phi3", "llama")),
    Row("context", {"tokens": 512}, ("llama", "qwen3", "gemma3_text")),
    Row("context", {"tokens": 512, "trained": 8, "rope": "longrope"}, ("llama", "phi3"), {"fit": 3}),
    Row("context", {"tokens": 512, "rope": "drope", "layers": "0"}, ("llama",)),
    Row("parallel", {"layers": "1"}, ("llama", "qwen3", "phi3"), {"refit": True}),
    Row("parallel", {}, ("llama",), {"refit": True}),
    Row("serial", {}, ("gpt_neox",), {"refit": True}),
)
EVERY = [pytest.param(row, model, id=f"{row}-{model}") for row in ROWS for model in row.models]
FIRST = [pytest.param(row, row.models[0], id=str(row)) for row in ROWS]
SAVED = [name for name in VARIANTS.names() if (v := VARIANTS.get(name)).weights is not None or v.rewrite is not None]


def converted(row: Row, model: str, folder: Path, **options: Any) -> Path:
    """The variant in a checkpoint."""
    source = tiny.save_tiny(model, folder / "source")
    variant = VARIANTS.get(row.variant)
    if variant.needs(variant.options.parse(row.options)):
        options = CALIBRATION | options
    convert(source, folder / "out", variants=[row.text], **options)
    return folder / "out"


def test_every_variant_that_can_be_saved_is_in_the_table() -> None:
    assert set(SAVED) == {row.variant for row in ROWS}


@pytest.mark.parametrize(("row", "model"), EVERY)
def test_it_loads_verifies_and_says_what_it_is(row: Row, model: str, tmp_path: Path) -> None:
    out = converted(row, model, tmp_path)
    assert verify(out, str(tmp_path / "source")).cache_error < 1e-4
    manifest = json.loads((out / "rehead.json").read_text())
    assert manifest["exact"] is False
    assert logits(loaded(out)).isfinite().all()
    assert not torch.equal(logits(loaded(out)), logits(loaded(tmp_path / "source")))
    config = AutoConfig.from_pretrained(out)
    config.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again").to_dict()
    assert again | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}


@pytest.mark.parametrize(("row", "model"), [case for case in EVERY if case.values[0].variant in live_names()])
def test_the_patched_original_equals_the_converted_checkpoint(row: Row, model: str, tmp_path: Path) -> None:
    out = converted(row, model, tmp_path)
    live = loaded(tmp_path / "source")
    with patch_model(live, row.variant, **row.options):
        ours = logits(live)
    torch.testing.assert_close(ours, logits(loaded(out)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("row", "model"), EVERY)
def test_its_layout_is_the_cache_that_it_leaves(row: Row, model: str, tmp_path: Path) -> None:
    """The plan's layout, the loaded config's and the tensors of a real cache, at two contexts."""
    out = converted(row, model, tmp_path)
    planned = plan(tmp_path / "source", variants=[row.text]).layouts
    live = loaded(out)
    assert planned == config_layouts(live.config, 4)
    variant = VARIANTS.get(row.variant)
    options = variant.options.parse(row.options)
    before = open_model(tmp_path / "source").layouts
    assert planned == [variant.layout(layer, options) for layer in before]
    for context in (4, IDS.shape[1]):
        with torch.no_grad():
            cache = returned_cache(live(IDS[:1, :context], use_cache=True))
        sizes = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
        assert sizes == [layer.cache_bytes(context) for layer in planned]


@pytest.mark.parametrize(("row", "model"), FIRST)
def test_it_recovers_on_text(row: Row, model: str, tmp_path: Path) -> None:
    plain = logits(loaded(converted(row, model, tmp_path)))
    done = convert(tmp_path / "source", tmp_path / "fitted", variants=[row.text], **row.recovery, **CALIBRATION)
    if row.recovery.get("fit"):
        assert all(facts["fit_loss"] >= 0 for facts in done.layers.values())
        assert done.layers
    assert not torch.equal(logits(loaded(tmp_path / "fitted")), plain)
    verify(tmp_path / "fitted", str(tmp_path / "source"))


@pytest.mark.parametrize(("row", "model"), FIRST)
def test_off_is_the_original(row: Row, model: str, tmp_path: Path) -> None:
    variant = VARIANTS.get(row.variant)
    options = variant.options.parse(row.options)
    off = variant.off(options)
    if off == options or row.variant in ("pool", "window"):  # which then have nothing to do
        pytest.skip("has no setting that changes nothing")
    source = tiny.save_tiny(model, tmp_path / "source")
    told = ",".join(f"{name}={value}" for name, value in off.as_json().items())
    convert(source, tmp_path / "out", variants=[f"{row.variant}:{told}"])
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("row", "model"), FIRST)
@pytest.mark.parametrize("recovers", [False, True])
def test_killed_and_resumed_it_is_the_same(row: Row, model: str, recovers: bool, tmp_path: Path, monkeypatch) -> None:
    """Stopped once half of the files are written, each of which holds a few tensors."""
    options = {**(row.recovery if recovers else {}), **CALIBRATION, "max_shard_size": "20KB"}
    whole = converted(row, model, tmp_path, **options)
    real, written = Target._sync_shard, []

    def stop(target: Target, *args: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(args)
        real(target, *args)

    monkeypatch.setattr(Target, "_sync_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "source", tmp_path / "resumed", variants=[row.text], resume=True, **options)
    monkeypatch.setattr(Target, "_sync_shard", real)
    convert(tmp_path / "source", tmp_path / "resumed", variants=[row.text], resume=True, **options)
    files = sorted(path.name for path in whole.iterdir() if path.name not in ("rehead.json", "README.md"))
    assert len(files) > 4
    for name in files:
        assert (whole / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()
    first, second = (json.loads((out / "rehead.json").read_text()) for out in (whole, tmp_path / "resumed"))
    assert first["layers"] == second["layers"]


def test_two_variants_in_one_run_are_the_same_as_in_two(tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    both = ["pool:num_key_value_heads=2", "temperature:start=1.25"]
    convert(source, tmp_path / "one", variants=both)
    convert(source, tmp_path / "half", num_key_value_heads=2)
    convert(tmp_path / "half", tmp_path / "two", variants=both[1:])
    assert torch.equal(logits(loaded(tmp_path / "one")), logits(loaded(tmp_path / "two")))
    manifest = json.loads((tmp_path / "one" / "rehead.json").read_text())
    assert manifest["variants"]["temperature"]["options"] == {"layers": "all", "start": 1.25}
    assert manifest["num_key_value_heads"]["after"] == 2
    fitted = convert(source, tmp_path / "fitted", variants=both, refit=True, fit=2, **CALIBRATION)
    assert {"groups", "fit_loss"} <= fitted.layers[0].keys()


def test_flags_and_variants_say_the_same(tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    flags = plan(source, num_key_value_heads=2, method="svd", block="parallel", layers="1")
    asked = plan(source, variants=["pool:num_key_value_heads=2,method=svd", "parallel:layers=1"])
    assert asked.as_json() == flags.as_json()


def test_the_command_line(tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    run = CliRunner().invoke
    done = run(convert_command, [str(source), str(tmp_path / "out"), "--variant", "temperature:start=2"])
    assert done.exit_code == 0, done.output
    assert "start 2.0" in done.output
    assert "temperature" in (tmp_path / "out" / "README.md").read_text()
    facts = json.loads(run(plan_command, [str(source), "--variant", "temperature:start=2", "--json"]).output)
    assert facts["variants"]["temperature"]["options"]["start"] == 2
    rows = {row["name"]: row for row in json.loads(run(variants_command, ["--json"]).output)}
    assert rows["temperature"]["live"]
    assert rows["temperature"]["saved"]
    assert not rows["window"]["exact"]
    assert "temperature" in run(variants_command, []).output


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        (["temprature:start=2"], "temperature"),
        (["temperature:stat=2"], "start"),
        (["temperature:start=-1"], "start"),
        (["tiled"], "live models only"),
        (["temperature:layers=auto"], "name the layers"),
        (["temperature:layers=7"], "layer 7"),
        (["parallel:fused"], "live models"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(variants: list[str], said: str, tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    with pytest.raises(UsageError) as caught:
        convert(source, tmp_path / "out", variants=variants)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_flag_and_a_variant_that_disagree_are_refused(tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    with pytest.raises(UsageError, match="given twice"):
        plan(source, num_key_value_heads=2, variants=["pool:num_key_value_heads=1"])


@pytest.mark.parametrize(("model", "changes"), [("llama4_text", {}), ("nanochat", {}), ("phi", {"qk_layernorm": True})])
def test_a_factor_that_the_query_norm_cannot_hold_is_refused(model: str, changes: dict, tmp_path: Path) -> None:
    """These norms undo a factor in the query's rows, so a checkpoint would silently be the original."""
    source = tiny.save_tiny(model, tmp_path / "source", **changes)
    with pytest.raises(UnsupportedError, match="cannot hold a factor"):
        convert(source, tmp_path / "out", variants=["temperature:start=2"])
    assert not (tmp_path / "out").exists()
