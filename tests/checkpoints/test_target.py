"""Writing a checkpoint: the right bytes, and plans that are not kept."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from writing import convert, expected_tensors, hashes, only

import checkpoints
from rehead.checkpoints import copying
from rehead.checkpoints.manifest import verify_files
from rehead.checkpoints.opening import open_source
from rehead.checkpoints.safetensors_io import header_bytes
from rehead.checkpoints.source import LocalSource
from rehead.checkpoints.target import OutputTensor, Target
from rehead.errors import UnsupportedError, UsageError, VerificationError


@pytest.mark.parametrize(("shards", "size"), [(1, "5GB"), (3, "5GB"), (1, "30KB"), (3, "20KB"), (3, 1)])
def test_the_bytes_are_those_of_the_plan(tmp_path, shards, size):
    """Values, dtypes, order inside the files, index, names and manifest, for every way of sharding."""
    folder = checkpoints.write_llama(tmp_path / "m", shards=shards)
    out = convert(folder, tmp_path / "out", size)
    expected = expected_tensors()
    files = sorted(out.glob("*.safetensors"))
    if shards == 1 and size == "5GB":
        assert [f.name for f in files] == ["model.safetensors"]
        assert not (out / "model.safetensors.index.json").exists()
    else:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert [f.name for f in files] == [
            f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
        ]
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
        assert set(index["weight_map"]) == set(expected)
        for name, file in index["weight_map"].items():
            assert name in load_file(out / file)
    if size == "5GB":
        assert len(files) == shards  # the source's sharding is kept
    got = {}
    for file in files:
        with safe_open(file, "pt") as f:
            assert f.metadata() == {"format": "pt"}
        got |= load_file(file)
    assert list(LocalSource(out).tensors) == list(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value), name
    manifest = verify_files(out)
    assert manifest["method"] == "mean"
    assert {k: v["sha256"] for k, v in manifest["files"].items()} | {
        "rehead.json": hashes(out)["rehead.json"]
    } == hashes(out)
    assert (out / "chat_template.jinja").read_bytes() == (folder / "chat_template.jinja").read_bytes()
    assert only(tmp_path) == {"m", "out"}


def test_transformers_loads_what_was_written(tmp_path, model):
    from transformers import AutoModelForCausalLM

    out = convert(model, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(
        loaded.model.layers[1].self_attn.k_proj.weight, expected_tensors()["model.layers.1.self_attn.k_proj.weight"]
    )


def test_equal_input_gives_equal_bytes(tmp_path, model):
    assert hashes(convert(model, tmp_path / "a", "40KB")) == hashes(convert(model, tmp_path / "b", "40KB"))


def test_computed_tensors_are_asked_for_in_the_order_of_the_files_and_once(tmp_path, model):
    asked = []

    def plan(source):
        entries, fetch = checkpoints.pooled_plan(source)
        return list(reversed(entries)), lambda name: (asked.append(name), fetch(name))[1]

    out = convert(model, tmp_path / "out", plan=plan)
    assert asked == [n for n in checkpoints.llama_tensors() if ".k_proj." in n or ".v_proj." in n]
    assert list(LocalSource(out).tensors) == list(checkpoints.llama_tensors())


def test_large_tensors_and_many_pieces(tmp_path):
    """Tensors larger than the buffers, copied and computed, come through whole and with the right hash."""
    big = torch.arange(3_000_001, dtype=torch.int64)
    folder = tmp_path / "m"
    folder.mkdir()
    checkpoints.save(folder / "model.safetensors", {"a": big, "b": big.flip(0), "c": torch.tensor([1.5])})
    (folder / "config.json").write_text("{}")

    def plan(source):
        entries = [OutputTensor("a", "I64", (3_000_001,), origin="a"), OutputTensor("b", "I64", (3_000_001,))]
        entries += [
            OutputTensor("c", "F32", (1,), origin="c"),
            OutputTensor("d", "BF16", (0, 4)),
            OutputTensor("e", "F32", ()),
        ]
        made = {"b": big * 3, "d": torch.empty(0, 4, dtype=torch.bfloat16), "e": torch.tensor(2.0)}
        return entries, made.__getitem__

    out = convert(folder, tmp_path / "out", plan=plan)
    got = load_file(out / "model.safetensors")
    assert torch.equal(got["a"], big)
    assert torch.equal(got["b"], big * 3)
    assert (got["c"].item(), got["e"].item(), tuple(got["d"].shape)) == (1.5, 2.0, (0, 4))
    verify_files(out)


def test_every_copied_byte_is_fetched_once_and_before_it_is_read(tmp_path, monkeypatch):
    numbers = torch.arange(4_000_000, dtype=torch.int64)
    folder = tmp_path / "m"
    folder.mkdir()
    checkpoints.save(folder / "model.safetensors", {"a": numbers, "b": numbers.flip(0)})
    (folder / "config.json").write_text("{}")
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(copying, "fetch_ahead", lambda fd, offset, length: told.append(("fetch", offset, length)))
    read = LocalSource.read_range

    def noted(self, shard, offset, out):
        told.append(("read", offset, len(out)))
        read(self, shard, offset, out)

    monkeypatch.setattr(LocalSource, "read_range", noted)
    convert(folder, tmp_path / "out")
    source = LocalSource(folder)
    at = end = source.tensors["a"].start
    for what, offset, length in told:
        if what == "fetch":
            assert offset == end
            assert length > 0
            end += length
        else:
            assert offset == at
            assert offset + length <= end
            at += length
    assert at == end == source.tensors["b"].end


def test_renamed_noncontiguous_and_fused_outputs(tmp_path, model):
    """A copy under another name, a transposed view, and new tensors stored beside the one they were made from."""

    def plan(source):
        w = source.read("lm_head.weight")
        t = source.tensors["lm_head.weight"]
        entries = [OutputTensor("head.renamed", t.dtype, t.shape, origin="lm_head.weight")]
        entries += [OutputTensor("head.t", t.dtype, (t.shape[1], t.shape[0]), after="model.embed_tokens.weight")]
        entries += [OutputTensor("model.norm.weight", "BF16", (64,), origin="model.norm.weight")]
        return entries, lambda name: w.t()

    out = convert(model, tmp_path / "out", plan=plan)
    source = LocalSource(out)
    head = checkpoints.llama_tensors()["lm_head.weight"]
    assert torch.equal(source.read("head.renamed"), head)
    assert torch.equal(source.read("head.t"), head.t())
    assert [source.tensors[n].file for n in ("head.t", "head.renamed")] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_progress_reaches_the_total_and_never_falls(tmp_path, model):
    source = open_source(model)
    entries, fetch = checkpoints.pooled_plan(source)
    seen = []
    with Target(tmp_path / "out", source=source, fingerprint="x") as target:
        target.write_weights(entries, fetch, progress=lambda done, total: seen.append((done, total)))
        target.commit()
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert seen[-1][0] == seen[-1][1] == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))


def test_a_copied_weight_that_is_not_finite_is_named(tmp_path, monkeypatch):
    """Wherever it lies in the pieces that are streamed: pieces of 16 bytes, tensors of two widths, odd sizes."""
    from rehead.checkpoints import stream

    monkeypatch.setattr(stream, "CHUNK", 16)
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    # A computed number comes first, so that the run of copies starts 2 bytes off and its F32 numbers lie across the
    # ends of the pieces.
    shapes = {"z": (1,), "layers.7.b": (3, 3), "a": (3, 5), "c": (7,)}
    dtypes = {"z": torch.bfloat16, "layers.7.b": torch.bfloat16, "a": torch.float32, "c": torch.float32}
    checked = 0

    def plan(source):
        copied = [
            OutputTensor(t.name, t.dtype, t.shape, origin=t.name) for t in source.tensors.values() if t.name != "z"
        ]
        return [OutputTensor("z", "BF16", (1,)), *copied], lambda name: torch.zeros(1, dtype=torch.bfloat16)

    for name, shape in list(shapes.items())[1:]:
        for at in range(0, torch.Size(shape).numel(), 3):
            tensors = {n: torch.zeros(s, dtype=dtypes[n]) for n, s in shapes.items()}
            tensors[name].view(-1)[at] = (float("nan"), float("inf"), float("-inf"))[at % 3]
            head = header_bytes(((n, checkpoints.CODES[t.dtype], t.shape) for n, t in tensors.items()), {})
            body = b"".join(t.view(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values())
            (folder / "model.safetensors").write_bytes(head + body)
            index = [int(i) for i in torch.unravel_index(torch.tensor(at), shape)]
            with pytest.raises(UnsupportedError, match="is not finite") as caught:
                convert(folder, tmp_path / "out", plan=plan)
            assert str(caught.value).startswith(name)
            assert f"element {index}" in str(caught.value)
            assert ("(layer 7)" in str(caught.value)) == (name == "layers.7.b")
            checked += 1
    assert checked == 11
    assert only(tmp_path) == {"m"}


@pytest.mark.parametrize("wrong", [torch.zeros(16, 64), torch.zeros(64, 16, dtype=torch.bfloat16)])
def test_a_step_that_breaks_the_plan_is_caught(tmp_path, model, wrong):
    def plan(source):
        return checkpoints.pooled_plan(source)[0], lambda name: wrong

    with pytest.raises(VerificationError, match=r"k_proj\.weight: computed as"):
        convert(model, tmp_path / "out", plan=plan)
    assert only(tmp_path) == {"m"}


def test_a_plan_at_odds_with_the_source_or_itself(tmp_path, model):
    def plan(entries):
        return lambda source: (entries, None)

    norm = OutputTensor("model.norm.weight", "BF16", (64,), origin="model.norm.weight")
    with pytest.raises(VerificationError, match="planned as F32"):
        convert(model, tmp_path / "out", plan=plan([OutputTensor("x", "F32", (64,), origin="model.norm.weight")]))
    with pytest.raises(UnsupportedError, match="ghost"):
        convert(model, tmp_path / "out", plan=plan([OutputTensor("x", "F32", (64,), origin="ghost")]))
    with pytest.raises(UsageError, match="planned twice"):
        convert(model, tmp_path / "out", plan=plan([norm, norm]))
    with pytest.raises(UsageError, match="no tensors"):
        convert(model, tmp_path / "out", plan=plan([]))
    assert only(tmp_path) == {"m"}


def test_names_that_climb_out_are_not_written(tmp_path, model):
    with Target(tmp_path / "out", source=open_source(model), fingerprint="x") as target:
        for name in ("../evil.txt", "/tmp/evil.txt"):
            with pytest.raises(UnsupportedError, match="outside OUT"):
                target.write_text(name, "x")
    assert only(tmp_path) == {"m"}
