"""Interrupted runs: nothing is left, or what is left is resumed."""

from __future__ import annotations

import json
import os
import signal
import threading

import pytest
from writing import Stop, convert, hashes, only, stop_at

import checkpoints
from rehead.checkpoints.manifest import completed, read_manifest, verify_files
from rehead.checkpoints.opening import open_source
from rehead.checkpoints.staging import only_unpublished, staging_path
from rehead.checkpoints.target import Target, finish_commit
from rehead.errors import UsageError


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
    """A finished file that has rotted, or lost its end, is written again."""
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


def test_only_a_complete_leftover_lacks_nothing_but_its_name(tmp_path, model):
    out = tmp_path / "out"
    assert not only_unpublished(out)
    with pytest.raises(KeyboardInterrupt):
        convert(model, out, "20KB", stop_at(2, KeyboardInterrupt()), resume=True)
    assert not only_unpublished(out)
    staging_path(out).joinpath("rehead.json").write_text("{}")  # of a run that may still write the weights
    assert not only_unpublished(out)
    convert(model, out).rename(staging_path(out))
    assert only_unpublished(out)


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
