"""Reading a local checkpoint: what is accepted, what is refused and with which words, and what travels along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import checkpoints
from rehead.checkpoints import opening
from rehead.checkpoints.finite import first_nonfinite
from rehead.checkpoints.opening import open_source, read_beforehand
from rehead.checkpoints.safetensors_io import DTYPE_BITS, header_bytes, read_header
from rehead.checkpoints.smallfiles import travels
from rehead.checkpoints.source import DTYPE_NAMES, LocalSource, torch_dtype
from rehead.errors import ReheadError, UnsupportedError, UsageError


def refused(call, kind: type[ReheadError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in text
    assert len(text) < 400
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("shards", [1, 3])
def test_names_values_and_order_are_those_of_the_files(tmp_path, shards):
    folder = checkpoints.write_llama(tmp_path / "m", shards=shards)
    expected = checkpoints.llama_tensors()
    source = open_source(folder)
    assert list(source.tensors) == list(expected)
    assert source.metadata == {"format": "pt"}
    assert len(source.shards) == shards
    for name, value in expected.items():
        got = source.read(name)
        assert got.dtype == value.dtype
        assert torch.equal(got, value)


def test_files_of_the_reference_library_read_the_same(tmp_path):
    """Every dtype that torch has, odd shapes, a scalar and an empty tensor, written by `safetensors` itself."""
    tensors = {}
    for code, name in DTYPE_NAMES.items():
        if code == "C64" or not hasattr(torch, name):
            continue
        data = torch.randint(0, 2, (24,), dtype=torch.uint8)
        tensors[code] = data.view(torch.uint8).view(getattr(torch, name)) if code != "BOOL" else data.bool()
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "odd": torch.randn(3, 1, 5)}
    try:
        save_file(tensors, tmp_path / "model.safetensors", {"a": "b"})
    except (KeyError, ValueError):  # an older safetensors does not know the rarest dtypes
        tensors = {k: v for k, v in tensors.items() if "FNUZ" not in k and "E8M0" not in k}
        save_file(tensors, tmp_path / "model.safetensors", {"a": "b"})
    (tmp_path / "config.json").write_text("{}")
    source = LocalSource(tmp_path)
    reference = load_file(tmp_path / "model.safetensors")
    assert source.metadata == {"a": "b"}
    assert set(source.tensors) == set(reference)
    for name, value in reference.items():
        got = source.read(name)
        assert (got.dtype, got.shape) == (value.dtype, value.shape)
        assert torch.equal(got.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))


def test_a_tensor_read_keeps_no_file_mapped(tmp_path):
    """A mapping of the file would let every page that was ever read count as this process's memory."""
    folder = checkpoints.write_llama(tmp_path / "m")
    source = LocalSource(folder)
    value = source.read("lm_head.weight")
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(folder) not in maps.read_text()
    value.zero_()
    assert not torch.equal(source.read("lm_head.weight"), value)


def test_opening_imports_no_torch(tmp_path):
    folder = checkpoints.write_llama(tmp_path / "m", shards=2)
    code = f"""
import sys
from rehead.checkpoints.opening import open_source
source = open_source({str(folder)!r})
assert source.tensors and source.small_files()
assert "torch" not in sys.modules and "huggingface_hub" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_disk_reads_the_start_of_the_weights_once_and_in_order(tmp_path, monkeypatch):
    for number, size in ((1, 500), (2, 100), (3, 700)):
        (tmp_path / f"model-{number}.safetensors").write_bytes(bytes(size))
    asked: list[tuple[str, int, int]] = []

    def fetch(fd: int, offset: int, length: int) -> None:
        asked.append((os.readlink(f"/proc/self/fd/{fd}")[-13:-12], offset, length))

    monkeypatch.setattr(opening, "fetch_ahead", fetch)
    monkeypatch.setattr(opening, "_BEFOREHAND", 800)
    monkeypatch.setattr(opening, "_PIECE", 256)
    opening._fetch_start(tmp_path)
    assert asked == [("1", 0, 256), ("1", 256, 244), ("2", 0, 100), ("3", 0, 200)]


@pytest.mark.parametrize("model", ["org/no-such-model", "", "~/nowhere"])
def test_nothing_is_read_and_nothing_said_where_there_is_no_folder(model, capfd):
    read_beforehand(model)
    for thread in threading.enumerate():
        if thread.name == "rehead-fetch":
            thread.join()
    assert capfd.readouterr() == ("", "")


def test_every_dtype_of_the_format_has_a_size_and_known_ones_a_torch_dtype():
    for code, name in DTYPE_NAMES.items():
        assert torch_dtype(code) == getattr(torch, name)
        assert torch_dtype(code).itemsize * 8 == DTYPE_BITS[code]
    refused(lambda: torch_dtype("F4"), UnsupportedError, "F4")


# ---- what is refused


def test_places_that_are_no_checkpoint(tmp_path):
    refused(lambda: open_source(str(tmp_path / "none")), UsageError, "no such folder", "Hub id")
    refused(lambda: open_source("./nowhere"), UsageError, "./nowhere", "no such folder")
    refused(lambda: open_source(""), UsageError)
    (tmp_path / "file").write_text("x")
    refused(lambda: open_source(str(tmp_path / "file")), UsageError, "is a file")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(lambda: open_source(empty), UsageError, "config.json")
    (empty / "config.json").write_text("{}")
    refused(lambda: open_source(empty), UnsupportedError, "no weights")
    refused(lambda: open_source(checkpoints.write_llama(tmp_path / "m"), "main"), UsageError, "revision")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", ("pickled", "save_pretrained", "pytorch_model.bin")),
        ("pytorch_model-00001-of-00002.bin", ("pickled", "save_pretrained")),
        ("consolidated.00.pth", ("pickled",)),
        ("model-q4.gguf", ("GGUF",)),
        ("tf_model.h5", ("TensorFlow",)),
        ("flax_model.msgpack", ("Flax",)),
        ("adapter_model.safetensors", ("adapter", "merge")),
        ("consolidated.safetensors", ("consolidated.safetensors", "save_pretrained")),
    ],
)
def test_other_formats_say_how_to_convert(tmp_path, name, words):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x02")
    refused(lambda: open_source(tmp_path), UnsupportedError, *words)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "\xff", "[" * 100_000, '{"a":' * 50_000])
def test_broken_configs(tmp_path, text):
    folder = checkpoints.write_llama(tmp_path / "m")
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(lambda: open_source(folder), UnsupportedError, "config.json")


def test_a_config_with_infinity_in_it_is_read_as_transformers_reads_it(tmp_path):
    folder = checkpoints.write_llama(tmp_path / "m")
    (folder / "config.json").write_text('{"model_type": "llama", "limit": Infinity}')
    assert open_source(folder).config["limit"] == float("inf")


def _raw(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def _entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def _header(table: dict, data: bytes = b"\0" * 8) -> bytes:
    return _raw(json.dumps(table).encode(), data)


LIES = {
    "empty file": (b"", "truncated"),
    "seven bytes": (b"\0" * 7, "truncated"),
    "length past the file": (_raw(b"{}", length=1000), "runs past"),
    "length over the limit": (_raw(b"{}", length=10**9), "100 MB"),
    "length 2**64-1": (b"\xff" * 8 + b"{}", "100 MB"),
    "no json": (_raw(b"hello world"), "JSON"),
    "no object": (_raw(b"[1, 2]"), "JSON object"),
    "bad utf-8": (_raw(b'{"\xff\xfe": 1}'), "UTF-8"),
    "nested": (_raw(b"[" * 200_000), "nested"),
    "huge number": (_raw(b'{"a": ' + b"9" * 10_000 + b"}"), "JSON"),
    "name twice": (_raw(b'{"a":%s,"a":%s}' % ((json.dumps(_entry()).encode(),) * 2), b"\0" * 8), "named twice"),
    "metadata no text": (_header({"__metadata__": {"a": 1}, "t": _entry()}), "__metadata__"),
    "entry no object": (_header({"t": 3}), "exactly"),
    "extra key": (_header({"t": {**_entry(), "x": 1}}), "exactly"),
    "unknown dtype": (_header({"t": _entry("Q7")}), "dtype"),
    "dtype no text": (_header({"t": _entry(7)}), "dtype"),
    "wrong dtype size": (_header({"t": _entry("F64")}), "needs 16"),
    "negative shape": (_header({"t": _entry(shape=(-2,))}), "shape"),
    "bool shape": (_header({"t": _entry(shape=(True, 2))}), "shape"),
    "float offsets": (_header({"t": _entry(offsets=(0, 8.0))}), "data_offsets"),
    "three offsets": (_header({"t": _entry(offsets=(0, 4, 8))}), "data_offsets"),
    "backwards": (_header({"t": _entry(offsets=(8, 0))}), "needs"),
    "overflow": (_header({"t": _entry(shape=(2**62, 2**62))}), "overflow"),
    "overflow beside zero": (_header({"t": _entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}, b""), "overflow"),
    "overlap": (_header({"a": _entry(), "b": _entry(offsets=(4, 12))}, b"\0" * 12), "overlaps"),
    "same bytes twice": (_header({"a": _entry(), "b": _entry()}), "overlaps"),
    "hole": (_header({"a": _entry(), "b": _entry(offsets=(12, 20))}, b"\0" * 20), "hole"),
    "hole in front": (_header({"a": _entry(offsets=(4, 12))}, b"\0" * 12), "hole"),
    "truncated data": (_header({"a": _entry()}, b"\0" * 7), "truncated"),
    "data left over": (_header({"a": _entry()}, b"\0" * 9), "end at byte"),
    "surrogate name": (_header({"\ud800": _entry()}), "valid name"),
    "newline in name": (_header({"a\nb": _entry("F64")}), "needs 16"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lying_headers(tmp_path, lie):
    raw, word = LIES[lie]
    folder = checkpoints.write_llama(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(raw)
    refused(lambda: open_source(folder), UnsupportedError, "model.safetensors", word)


@pytest.mark.parametrize(
    ("shard", "word"),
    [
        ("../secret.safetensors", "outside"),
        ("a/../../secret.safetensors", "outside"),
        ("/etc/secret.safetensors", "outside"),
        ("..\\secret.safetensors", "outside"),
        ("C:secret.safetensors", "outside"),
        ("//host/secret.safetensors", "outside"),
        ("./x.safetensors", "outside"),
        ("a\nb.safetensors", "outside"),
        ("x.bin", ".safetensors"),
        ("", ".safetensors"),
        (7, "file name"),
        (None, "file name"),
        ("model-00009-of-00009.safetensors", "missing"),
    ],
)
def test_indexes_that_name_what_they_must_not(tmp_path, shard, word):
    folder = checkpoints.write_llama(tmp_path / "m", shards=2)
    (tmp_path / "secret.safetensors").write_bytes(header_bytes([], {}))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = shard
    path.write_text(json.dumps(index))
    refused(lambda: open_source(folder), UnsupportedError, word)


def test_indexes_that_disagree_with_the_shards(tmp_path):
    folder = checkpoints.write_llama(tmp_path / "m", shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    refused(lambda: open_source(folder), UnsupportedError, "model.ghost.weight", "model-00001-of-00002.safetensors")
    for text in ("{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "nonsense", ""):
        path.write_text(text)
        refused(lambda: open_source(folder), UnsupportedError, "model.safetensors.index.json")


def test_a_tensor_in_two_shards_is_the_one_the_index_names(tmp_path):
    folder = checkpoints.write_llama(tmp_path / "m", shards=2)
    first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    old = {k: v.clone() for k, v in load_file(first).items()}  # cloned, since the file under it is written again
    extra = torch.full((50, 64), 7.0, dtype=torch.bfloat16)
    checkpoints.save(first, {**old, "lm_head.weight": extra})
    source = open_source(folder)
    assert source.tensors["lm_head.weight"].file == second.name
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))
    refused(lambda: open_source(folder), UnsupportedError, "lm_head.weight", "both")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    folder = checkpoints.write_llama(tmp_path / "m")
    source = open_source(folder)
    os.truncate(folder / "model.safetensors", 4096)
    refused(lambda: source.read("lm_head.weight"), UnsupportedError, "model.safetensors", "ended early")
    refused(lambda: source.read("no.such.tensor"), UnsupportedError, "no.such.tensor")


# ---- what travels


def test_small_files_travel_and_weights_code_and_private_things_do_not(tmp_path):
    folder = checkpoints.write_llama(tmp_path / "m")
    yes = ["tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "NOTICE.txt",
           "chat_templates/tool.jinja", "preprocessor_config.json", "vocab.txt.gz"]  # fmt: skip
    no = ["pytorch_model.bin", "model.gguf", "tf_model.h5", "flax_model.msgpack", "x.onnx", "modeling_evil.py", "x.pkl",
          "pytorch_model.bin.index.json", "optimizer.pt", ".gitattributes", ".git/config", ".cache/x.json",
          "rehead.json", "original/consolidated.00.pth", "__pycache__/x.pyc"]  # fmt: skip
    for name in yes + no:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    source = open_source(folder)
    always = ["LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer.json"]
    assert source.small_files() == sorted(yes + always)
    assert source.open_small("tokenizer.model").read() == b"tokenizer.model"
    assert source.model_card().startswith("---\nlicense: apache-2.0")
    assert not travels("README.md")
    assert not travels("config.json")


def test_links_out_of_the_folder_are_refused_but_the_hub_caches_own_are_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("key")
    folder = checkpoints.write_llama(tmp_path / "m")
    (folder / "tokenizer.model").symlink_to(secret)
    source = open_source(folder)
    refused(lambda: source.open_small("tokenizer.model"), UnsupportedError, "tokenizer.model", "link")
    (folder / "tokenizer.model").unlink()
    (folder / "alias.json").symlink_to(folder / "tokenizer.json")
    assert open_source(folder).open_small("alias.json").read() == (folder / "tokenizer.json").read_bytes()

    blobs, snapshot = tmp_path / "models--me--x" / "blobs", tmp_path / "models--me--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(p for p in folder.iterdir() if p.is_file() and not p.is_symlink()):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    source = open_source(snapshot)
    assert source.open_small("LICENSE").read() == b"Apache-2.0\n"
    assert source.read("lm_head.weight").shape == (50, 64)


def test_the_fingerprint_follows_the_content(tmp_path):
    folder = checkpoints.write_llama(tmp_path / "m", shards=2)
    first = open_source(folder).fingerprint()
    assert open_source(folder).fingerprint() == first
    (folder / ".notes").write_text("not part of the model")
    assert open_source(folder).fingerprint() == first
    (folder / "tokenizer.json").write_text("{}")
    second = open_source(folder).fingerprint()
    assert second != first
    shard = folder / "model-00002-of-00002.safetensors"
    os.utime(shard, ns=(1, 1))
    assert open_source(folder).fingerprint() != second


def test_header_of_a_file_that_cannot_be_read(tmp_path):
    refused(lambda: read_header(tmp_path / "x.safetensors"), UnsupportedError, "x.safetensors")
    (tmp_path / "d.safetensors").mkdir()
    refused(lambda: read_header(tmp_path / "d.safetensors"), UnsupportedError, "d.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_first_nonfinite_number_is_found(dtype, bad):
    x = torch.zeros(3, 700, 1000, dtype=torch.float32)
    assert first_nonfinite(x.to(dtype)) is None
    x[1, 300, 7] = bad
    x[2, 0, 0] = bad
    assert first_nonfinite(x.to(dtype)) == (1, 300, 7)


def test_finite_extremes_and_integers_are_finite():
    assert first_nonfinite(torch.full((5,), torch.finfo(torch.float32).max)) is None
    assert first_nonfinite(torch.full((2_000_000,), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16)) is None
    assert first_nonfinite(torch.arange(4)) is None
    assert first_nonfinite(torch.tensor([1 + 1j, complex(0, float("nan"))])) == (1,)
    assert first_nonfinite(torch.empty(0)) is None
    assert first_nonfinite(torch.tensor(float("inf"))) == ()


def test_a_revision_is_told_from_a_folder_with_an_at_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rehead.checkpoints.opening import split_revision
    from rehead.recipes.evaluation.models import open_named
    from rehead.recipes.pipeline.graph import Place
    from rehead.recipes.pipeline.record import name_of
    from rehead.recipes.training.models import open_checkpoint

    assert split_revision("owner/name") == ("owner/name", None)
    assert split_revision("owner/name@v1") == ("owner/name", "v1")
    assert split_revision("owner/name@refs/pr/1") == ("owner/name", "refs/pr/1")
    assert split_revision("./missing@v1") == ("./missing@v1", None)
    monkeypatch.chdir(tmp_path)
    tiny.save_tiny("llama", tmp_path / "run@2")
    # Every command that takes id@revision reads the folder.
    assert open_checkpoint("run@2").source.revision is None
    assert open_named("run@2").revision is None
    assert name_of(Place(model="run@2")) == ("run@2", None)
    assert name_of(Place(model="owner/name@v1")) == ("owner/name", "v1")
    assert name_of(Place(model="owner/name", revision="v2")) == ("owner/name", "v2")
