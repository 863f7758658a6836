"""Writing a checkpoint: the right bytes, all or nothing, and every refusal before anything is lost."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rehead.convert import staging
from rehead.convert.manifest import completed, read_manifest, verify_files
from rehead.convert.safetensors_io import header_bytes
from rehead.convert.source import LocalSource, open_source
from rehead.convert.target import OutputTensor, ResourceError, Target, finish_commit
from rehead.errors import UnsupportedError, UsageError, VerificationError

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("checkpoints", HERE / "checkpoints.py")
checkpoints = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(checkpoints)


def convert(folder: Path, out: Path, size: str | int = "5GB", plan=None, **options) -> Path:
    """A plain mean pooling through Target, as the smallest possible user of it."""
    source = open_source(folder)
    entries, fetch = plan(source) if plan else checkpoints.pooled_plan(source)
    with Target(out, source=source, **{"fingerprint": "x", **options}) as target:
        target.write_weights(entries, fetch, size)
        target.copy_small_files()
        target.write_text("config.json", json.dumps({**source.config, "num_key_value_heads": 1}))
        target.commit({"method": "mean"})
    return out


def hashes(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def expected_tensors(**sizes) -> dict[str, torch.Tensor]:
    out = {}
    for name, w in checkpoints.llama_tensors(**sizes).items():
        pooled = ".k_proj." in name or ".v_proj." in name
        out[name] = w.view(1, -1, 16, w.shape[1]).float().mean(1).reshape(16, -1).to(w.dtype) if pooled else w
    return out


@pytest.fixture
def model(tmp_path):
    return checkpoints.write_llama(tmp_path / "m", shards=3)


def only(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


# ---- what is written


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
    from rehead.convert import stream

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


# ---- plans that are not kept


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


# ---- where OUT may not be


def test_places_where_out_may_not_be(tmp_path, model):
    def refused(out, words, **options):
        with pytest.raises(UsageError, match=words):
            convert(model, out, **options)

    before = hashes(model)
    refused(model, "source itself")
    refused(model, "source itself", overwrite=True)
    refused(model / "sub", "inside the source", overwrite=True)
    refused(tmp_path, "lies inside OUT", overwrite=True)
    (tmp_path / "link").symlink_to(model)
    refused(tmp_path / "link", "source itself", overwrite=True)
    refused(tmp_path / "link" / "sub", "inside the source", overwrite=True)
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "already exists")
    refused(tmp_path / "file", "not a folder", overwrite=True)
    refused(tmp_path / "file" / "out", "is no folder")
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("meow")
    refused(other, "already exists")
    refused(other, "no checkpoint", overwrite=True)
    assert hashes(model) == before
    assert only(tmp_path) == {"m", "link", "file", "photos"}


@pytest.mark.parametrize("swap", [True, False])
def test_overwriting_replaces_the_old_output_at_the_very_end(tmp_path, model, monkeypatch, swap):
    """In one step where the system can exchange two folders, in two renames elsewhere."""
    if not swap:
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    out = convert(model, tmp_path / "out", "20KB")
    old = hashes(out)

    def plan(source):
        entries, fetch = checkpoints.pooled_plan(source)

        def check(name):
            assert hashes(out) == old  # untouched while the new one is made
            return fetch(name)

        return entries, check

    convert(model, out, "5GB", plan=plan, overwrite=True)
    assert len(list(out.glob("*.safetensors"))) == 3
    verify_files(out)
    assert only(tmp_path) == {"m", "out"}
    with pytest.raises(UsageError, match="already exists"):
        convert(model, out)


def test_a_failed_overwrite_keeps_the_old_output(tmp_path, model):
    out = convert(model, tmp_path / "out")
    old = hashes(out)
    with pytest.raises(VerificationError):
        convert(model, out, plan=lambda s: (checkpoints.pooled_plan(s)[0], lambda n: torch.zeros(1)), overwrite=True)
    assert hashes(out) == old
    assert only(tmp_path) == {"m", "out"}


def test_an_overwrite_killed_between_its_two_renames_is_put_right_by_the_next_run(tmp_path, model):
    out = convert(model, tmp_path / "out")
    old = hashes(out)
    out.rename(tmp_path / ".out.rehead-old")
    with pytest.raises(UsageError, match="already exists"):
        convert(model, out)
    assert hashes(out) == old
    assert only(tmp_path) == {"m", "out"}


def test_missing_parents_are_made_and_unmade(tmp_path, model):
    deep = tmp_path / "a" / "b" / "out"
    with pytest.raises(VerificationError):
        convert(model, deep, plan=lambda s: (checkpoints.pooled_plan(s)[0], lambda n: torch.zeros(1)))
    assert only(tmp_path) == {"m"}
    verify_files(convert(model, deep))


def test_two_runs_at_once_do_not_meet(tmp_path, model):
    """The second is told which process is at work, and the first ends as if nothing had happened."""
    source = open_source(model)
    entries, fetch = checkpoints.pooled_plan(source)
    code = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from rehead.convert.source import open_source
from rehead.convert.target import Target
from rehead.errors import UsageError
source = open_source({str(model)!r})
try:
    Target({str(tmp_path / "out")!r}, source=source, fingerprint="x", resume=sys.argv[1] == "resume")
except UsageError as err:
    print(err)
"""
    with Target(tmp_path / "out", source=source, fingerprint="x") as target:
        target.write_weights(entries, fetch)
        for how in ("fresh", "resume"):
            said = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout
            assert f"process {os.getpid()}" in said
        target.commit()
    verify_files(tmp_path / "out")
    assert only(tmp_path) == {"m", "out"}


# ---- interruptions


class Stop(BaseException):
    """Stands for anything that ends a run from outside."""


def stop_at(count: int, error: BaseException):
    """A plan whose fetch raises on its n-th call."""

    def plan(source):
        entries, fetch = checkpoints.pooled_plan(source)
        calls = []

        def fetch_or_stop(name):
            calls.append(name)
            if len(calls) == count:
                raise error
            return fetch(name)

        return entries, fetch_or_stop

    return plan


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(143), Stop(), ValueError("bug"), OSError(5, "I/O error")]
)
@pytest.mark.parametrize("count", [1, 4])
def test_an_interrupted_run_leaves_nothing(tmp_path, model, error, count):
    threads = threading.active_count()
    with pytest.raises(type(error)):
        convert(model, tmp_path / "out", "20KB", plan=stop_at(count, error))
    assert only(tmp_path) == {"m"}
    assert threading.active_count() == threads


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_resumed_run_ends_with_the_same_bytes_and_repeats_no_finished_file(tmp_path, model, count):
    whole = hashes(convert(model, tmp_path / "whole", "20KB", fingerprint={"plan": 1}))
    with pytest.raises(KeyboardInterrupt):
        convert(
            model, tmp_path / "out", "20KB", stop_at(count, KeyboardInterrupt()), resume=True, fingerprint={"plan": 1}
        )
    assert only(tmp_path) == {"m", "whole", ".out.rehead-staging"}
    stage = tmp_path / ".out.rehead-staging"
    done = [json.loads(line)["file"] for line in (stage / ".rehead" / "journal.jsonl").read_text().splitlines()[1:]]
    before = {name: (stage / name).stat().st_mtime_ns for name in done}
    kept = {}

    def plan(source):
        kept.update({name: (stage / name).stat().st_mtime_ns for name in done})
        return checkpoints.pooled_plan(source)

    out = convert(model, tmp_path / "out", "20KB", plan, resume=True, fingerprint={"plan": 1})
    assert done
    assert before == kept == {name: (out / name).stat().st_mtime_ns for name in done}
    assert hashes(out) == whole
    assert only(tmp_path) == {"m", "whole", "out"}


def test_resuming_checks_what_the_killed_run_left(tmp_path, model):
    """A finished file that has rotted, or lost its end, is written anew."""
    whole = hashes(convert(model, tmp_path / "whole", "20KB"))
    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "out", "20KB", stop_at(4, KeyboardInterrupt()), resume=True)
    first, second, *_ = sorted((tmp_path / ".out.rehead-staging").glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    os.truncate(second, 100)
    assert hashes(convert(model, tmp_path / "out", "20KB", resume=True)) == whole


def test_resuming_another_conversion_says_what_changed(tmp_path, model):
    with pytest.raises(KeyboardInterrupt):
        convert(
            model,
            tmp_path / "out",
            plan=stop_at(2, KeyboardInterrupt()),
            resume=True,
            fingerprint={"source": 1, "plan": 2},
        )
    with pytest.raises(UsageError, match="since plan changed"):
        convert(model, tmp_path / "out", resume=True, fingerprint={"source": 1, "plan": 3})
    assert ".out.rehead-staging" in only(tmp_path)  # still there for the run that it belongs to
    convert(model, tmp_path / "out", resume=True, fingerprint={"source": 1, "plan": 2})
    assert only(tmp_path) == {"m", "out"}


def test_a_fresh_run_throws_away_what_a_killed_one_left(tmp_path, model):
    whole = hashes(convert(model, tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "out", "20KB", plan=stop_at(4, KeyboardInterrupt()), resume=True)
    (tmp_path / ".out.rehead-staging" / "stray.txt").write_text("x")
    assert hashes(convert(model, tmp_path / "out")) == whole
    assert only(tmp_path) == {"m", "whole", "out"}


def test_another_split_leaves_no_strays(tmp_path, model):
    """The sharding is the plan's business, so a changed one may be resumed; files of the old one must not stay."""
    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "out", "20KB", plan=stop_at(4, KeyboardInterrupt()), resume=True)
    out = convert(model, tmp_path / "out", "5GB", resume=True)
    assert len(list(out.glob("*.safetensors"))) == 3
    verify_files(out)


def test_intermediate_results_survive_an_interruption_and_vanish_at_the_end(tmp_path, model):
    source = open_source(model)

    def interrupted():
        with Target(tmp_path / "out", source=source, fingerprint="x", resume=True) as target:
            assert not target.resumed
            target.remember("0", {"error": 0.25})
            target.remember("1", [1, 2])
            (target.work_dir / "layer0.safetensors").write_bytes(b"result")
            raise Stop

    with pytest.raises(Stop):
        interrupted()
    entries, fetch = checkpoints.pooled_plan(source)
    with Target(tmp_path / "out", source=source, fingerprint="x", resume=True) as target:
        assert target.resumed
        assert target.remembered == {"0": {"error": 0.25}, "1": [1, 2]}
        assert (target.work_dir / "layer0.safetensors").read_bytes() == b"result"
        target.write_weights(entries, fetch)
        target.commit()
    verify_files(tmp_path / "out")
    assert not (tmp_path / "out" / ".rehead").exists()


def test_a_run_killed_just_before_the_rename_is_resumed_from_its_manifest(tmp_path, model):
    whole = convert(model, tmp_path / "whole")
    expected = hashes(whole)
    whole.rename(tmp_path / ".out.rehead-staging")

    def never(source):
        def fetch(name):
            raise AssertionError("everything was there already")

        return checkpoints.pooled_plan(source)[0], fetch

    assert hashes(convert(model, tmp_path / "out", plan=never, resume=True)) == expected


@pytest.mark.parametrize("left", [(), ("owner.json",), ("notes.jsonl", "work/x")])
def test_the_last_step_of_a_killed_run_is_done_without_the_rest(tmp_path, model, left):
    whole = convert(model, tmp_path / "whole", fingerprint={"plan": 1})
    expected = hashes(whole)
    stage = tmp_path / ".out.rehead-staging"
    whole.rename(stage)
    for name in left:
        (stage / ".rehead" / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / ".rehead" / name).write_text("x")
    assert finish_commit(tmp_path / "out", {"plan": 2}) is None
    assert finish_commit(tmp_path / "out", {"plan": 1})["method"] == "mean"
    assert hashes(tmp_path / "out") == expected
    assert only(tmp_path) == {"m", "out"}
    assert finish_commit(tmp_path / "out", {"plan": 1})["method"] == "mean"


def test_a_complete_output_is_recognised(tmp_path, model):
    out = convert(model, tmp_path / "out", fingerprint="x")
    assert completed(out, read_manifest(out)["fingerprint"])["method"] == "mean"
    assert completed(out, "another") is None
    assert completed(tmp_path / "none", "x") is None
    (out / "LICENSE").unlink()
    assert completed(out, "x") is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_terminating_signals_clean_up(tmp_path, model, number):
    """A killed process group gets SIGTERM first; that must leave as little behind as Ctrl-C does."""
    outer = signal.signal(number, signal.SIG_DFL)  # whoever started us may ignore it, as nohup does
    try:
        with pytest.raises(SystemExit) as stopped:
            convert(
                model,
                tmp_path / "out",
                plan=lambda s: (checkpoints.pooled_plan(s)[0], lambda n: os.kill(os.getpid(), number)),
            )
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, outer)
    assert stopped.value.code == 128 + number
    assert only(tmp_path) == {"m"}


# ---- disks


@pytest.mark.parametrize("where", ["weights", "small"])
def test_a_file_size_limit_ends_in_one_line(tmp_path, model, where):
    """EFBIG met while writing: exit 3, one line, nothing left; with --resume the finished files stay."""
    (model / "tokenizer.json").write_bytes(b"x" * 40_000)
    code = f"""
import json, resource, sys
sys.path.insert(0, {str(HERE)!r})
from checkpoints import pooled_plan
from rehead.convert.source import open_source
from rehead.convert.target import Target
from rehead.errors import ReheadError
resource.setrlimit(resource.RLIMIT_FSIZE, ({30_000 if where == "weights" else 25_000}, resource.RLIM_INFINITY))
source = open_source({str(model)!r})
entries, fetch = pooled_plan(source)
try:
    with Target({str(tmp_path / "out")!r}, source=source, fingerprint="x") as t:
        t.write_weights(entries, fetch, {"5GB" if where == "weights" else "15KB"!r})
        t.copy_small_files()
        t.commit()
except ReheadError as err:
    print(err.exit_code, err)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("3 ")
    assert said.count("\n") == 1
    assert ("safetensors" if where == "weights" else "tokenizer.json") in said
    assert "size limit" in said
    assert only(tmp_path) == {"m"}


def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path, model, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ResourceError, match=r"needs .* GB and the disk has") as caught:
        convert(model, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert only(tmp_path) == {"m"}


@pytest.mark.parametrize("resume", [False, True])
def test_a_disk_that_fills_up_meanwhile(tmp_path, model, monkeypatch, resume):
    """ENOSPC out of the writing thread reaches the caller as one line; a resumable run keeps what it has."""
    real, written = os.pwrite, []

    def full(fd, data, offset):
        if threading.current_thread().name == "rehead-write":
            written.append(len(data))
            if sum(written) > 60_000:
                raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    whole = hashes(convert(model, tmp_path / "whole", "20KB"))
    written.clear()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        convert(model, tmp_path / "out", "20KB", resume=resume)
    monkeypatch.undo()
    assert only(tmp_path) == {"m", "whole"} | ({".out.rehead-staging"} if resume else set())
    assert hashes(convert(model, tmp_path / "out", "20KB", resume=resume)) == whole


def test_a_callers_own_full_disk_is_one_line_too(tmp_path, model):
    with pytest.raises(ResourceError, match="the disk is full"):
        convert(model, tmp_path / "out", plan=stop_at(1, OSError(28, "No space left on device")))
    assert only(tmp_path) == {"m"}


def test_a_folder_that_may_not_be_written(tmp_path, model):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(ResourceError, match="permission denied"):
        convert(model, locked / "out")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's figures from /proc")
def test_memory_does_not_follow_the_size_of_the_model(tmp_path):
    """Copying 400 MB grows the process by less than 60 MB, most of which are the buffers."""
    folder = tmp_path / "m"
    folder.mkdir()
    piece = torch.zeros(25_000_000, dtype=torch.bfloat16)
    checkpoints.save(folder / "model.safetensors", {f"t{i}": piece for i in range(8)})
    (folder / "config.json").write_text("{}")
    code = f"""
import torch
from rehead.convert.source import open_source
from rehead.convert.target import OutputTensor, Target
def peak():  # the kernel's high-water mark of this very program; ru_maxrss would start from the parent's
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
source = open_source({str(folder)!r})
entries = [OutputTensor(t.name, t.dtype, t.shape, origin=t.name) for t in source.tensors.values()]
before = peak()
with Target({str(tmp_path / "out")!r}, source=source, fingerprint="x") as target:
    target.write_weights(entries, None)
    target.commit()
print(peak() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 10e6 < grown < 60e6


# ---- checking what is there


def test_verification_names_what_is_wrong(tmp_path, model):
    out = convert(model, tmp_path / "out")
    assert verify_files(out)["files"]

    def fails(word: str, exception=VerificationError) -> None:
        with pytest.raises(exception, match=word) as caught:
            verify_files(out)
        assert "\n" not in str(caught.value)

    license_file = out / "LICENSE"
    text = license_file.read_bytes()
    license_file.write_bytes(text.swapcase())
    fails("LICENSE: its SHA-256")
    license_file.write_bytes(text + b"x")
    fails("LICENSE: 12 bytes where the manifest says 11")
    license_file.unlink()
    fails("'LICENSE' is missing")
    license_file.write_bytes(text)
    (out / "extra.bin").write_text("x")
    fails("'extra.bin' is not in the manifest")
    assert verify_files(out, allow_extra=True)
    (out / "extra.bin").unlink()
    shard = next(out.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 0x40
    shard.write_bytes(data)
    fails(f"{shard.name}: its SHA-256")
    data[-3] ^= 0x40
    shard.write_bytes(data)
    verify_files(out)
    (out / "rehead.json").write_text("{")
    fails("rehead.json")
    (out / "rehead.json").unlink()
    fails("no rehead.json", UsageError)
