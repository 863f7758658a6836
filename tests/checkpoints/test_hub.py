"""The Hub: the real client in a process of its own, against a server on 127.0.0.1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest

import checkpoints
from rehead.checkpoints.manifest import verify_files
from rehead.checkpoints.safetensors_io import header_bytes
from rehead.checkpoints.source import LocalSource
from rehead.checkpoints.target import Target

HERE = Path(__file__).parents[1] / "helpers"


@pytest.fixture
def hub():
    with hub_server.HubServer() as server:
        yield server


@pytest.fixture
def client(hub, tmp_path):
    """Run a snippet that fills the dict `out`, as a user's process would run it; returns that dict."""

    def run(code: str, **env: str) -> dict:
        whole = (
            f"import json, sys\nsys.path.insert(0, {str(HERE)!r})\nout = {{}}\n{code}\nprint('OUT' + json.dumps(out))"
        )
        base = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        settings = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub_server.TOKEN,
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", whole], env={**base, **settings, **env}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.rsplit("OUT", 1)[1])

    return run


CATCH = """
from rehead.errors import ReheadError
from rehead.checkpoints.opening import open_source
def caught(call):
    try:
        call()
    except ReheadError as err:
        return [type(err).__name__, err.exit_code, str(err)]
    return None
"""


COMMANDS = """
from rehead import cli
def rehead(*argv):
    try:
        cli.main([*argv, "--json"])
    except SystemExit as done:
        return done.code or 0
def convert(model, where, *flags):
    assert rehead("convert", model, where, "--kv-heads", "1", *flags) == 0
"""


def one_line(error: list, *words: str) -> None:
    assert "\n" not in error[2]
    assert len(error[2]) < 300
    for word in words:
        assert word in error[2], error[2]


def test_planning_a_70b_model_moves_only_headers(hub, client, tmp_path):
    """80 layers in 30 shards, 138 GB: names, shapes and dtypes arrive in well under a megabyte, without torch."""
    folder = tmp_path / "big"
    folder.mkdir()
    h, inner, kv = 8192, 28672, 1024
    shapes = {"model.embed_tokens.weight": (32000, h), "lm_head.weight": (32000, h), "model.norm.weight": (h,)}
    for i in range(80):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,)}
        shapes |= {p + f"mlp.{x}_proj.weight": (inner, h) for x in ("gate", "up")} | {
            p + "mlp.down_proj.weight": (h, inner)
        }
        shapes |= {p + f"self_attn.{x}_proj.weight": (kv if x in "kv" else h, h) for x in "qkvo"}
    names = list(shapes)
    weight_map = {}
    for i in range(30):
        part = names[i::30]
        file = f"model-{i + 1:05d}-of-00030.safetensors"
        head = header_bytes(((n, "BF16", shapes[n]) for n in part), {"format": "pt"})
        (folder / file).write_bytes(head)
        size = len(head) + sum(2 * shapes[n][0] * (shapes[n][1] if len(shapes[n]) > 1 else 1) for n in part)
        os.truncate(folder / file, size)  # sparse: nothing but the header takes space
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = checkpoints.llama_config(layers=80, hidden=h, heads=64, inner=inner, vocab=32000)
    (folder / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 8}))
    hub.add_folder("big/llama-70b", folder)
    out = client(
        "from rehead.checkpoints.opening import open_source\ns = open_source('big/llama-70b')\n"
        "out = {'tensors': len(s.tensors), 'bytes': sum(t.nbytes for t in s.tensors.values()), "
        "'torch': 'torch' in sys.modules}"
    )
    assert out["tensors"] == len(shapes)
    assert out["bytes"] > 130e9
    assert not out["torch"]
    assert 0 < hub.sent < 1_000_000
    hub.reset_counts()
    assert client(COMMANDS + "out['plan'] = rehead('plan', 'big/llama-70b', '--kv-heads', '1')")["plan"] == 0
    assert 0 < hub.sent < 1_000_000


def test_convert_by_revision_push_and_verify_a_fresh_download(hub, client, tmp_path):
    """The commands: an older commit is converted as from its folder, pushed, and verifies when downloaded anew."""
    old = checkpoints.write_llama(tmp_path / "old", shards=3)
    new = checkpoints.write_llama(tmp_path / "new", shards=2, seed=1)
    sha = hub.add_folder("me/tiny", old)
    hub.add_folder("me/tiny", new)
    out = client(
        COMMANDS
        + f"convert('me/tiny', {str(tmp_path / 'out')!r}, '--revision', {sha!r}, '--push-to-hub', 'me/converted')\n"
        f"convert({str(old)!r}, {str(tmp_path / 'local')!r})\n"
        "from huggingface_hub import snapshot_download\n"
        f"folder = snapshot_download('me/converted', local_dir={str(tmp_path / 'down')!r})\n"
        "out['verify'] = rehead('verify', folder, '--source', 'me/tiny', '--revision', " + repr(sha) + ")\n"
    )
    assert out["verify"] == 0
    downloaded = verify_files(tmp_path / "down")
    assert (downloaded["source"], downloaded["revision"]) == ("me/tiny", sha)
    local = verify_files(tmp_path / "local")["files"]
    differ = {name for name in local if downloaded["files"][name] != local[name]}
    assert differ <= {"README.md"}  # which names the source
    assert sum(name.endswith(".safetensors") for name in local) == 3


def test_each_failure_of_opening_is_one_clear_line(hub, client, tmp_path):
    model = checkpoints.write_llama(tmp_path / "m", shards=2)
    hub.add_folder("me/tiny", model)
    hub.add_folder("big/gated", model, gated=403)
    hub.add_folder("big/gated401", model, gated=401)
    hub.add_folder("me/private", model, private=True)
    pickles = tmp_path / "p"
    pickles.mkdir()
    (pickles / "config.json").write_text("{}")
    (pickles / "pytorch_model.bin").write_bytes(b"x")
    hub.add_folder("me/pickles", pickles)
    holes = tmp_path / "h"
    checkpoints.write_llama(holes, shards=2)
    (holes / "model-00002-of-00002.safetensors").unlink()
    hub.add_folder("me/holes", holes)
    lying = checkpoints.write_llama(tmp_path / "l")
    data = bytearray((lying / "model.safetensors").read_bytes())
    data[:8] = (10**15).to_bytes(8, "little")
    (lying / "model.safetensors").write_bytes(data)
    hub.add_folder("me/lying", lying)
    asks = {
        "wrong": "open_source('me/no-such-model')", "gated": "open_source('big/gated')",
        "gated401": "open_source('big/gated401')", "revision": "open_source('me/tiny', 'no-such-branch')",
        "id": "open_source('not a valid id')", "pickles": "open_source('me/pickles')",
        "holes": "open_source('me/holes')", "lying": "open_source('me/lying')",
    }  # fmt: skip
    got = client(CATCH + "".join(f"out[{k!r}] = caught(lambda: {v})\n" for k, v in asks.items()))
    assert got["wrong"][1] == 2
    one_line(got["wrong"], "me/no-such-model", "hf auth login")
    for key in ("gated", "gated401"):
        assert got[key][1] == 3
        one_line(got[key], "gated", "accept its terms", "hf auth login")
    assert got["revision"][1] == 2
    one_line(got["revision"], "no-such-branch")
    assert got["id"][1] == 2
    one_line(got["id"], "owner/name")
    assert got["pickles"][1] == 3
    one_line(got["pickles"], "pytorch_model.bin", "save_pretrained")
    assert got["holes"][1] == 3
    one_line(got["holes"], "model-00002-of-00002.safetensors", "missing")
    assert got["lying"][1] == 3
    one_line(got["lying"], "model.safetensors", "100 MB")

    private = client(CATCH + "out['x'] = caught(lambda: open_source('me/private'))", HF_TOKEN="hf_wrong")
    one_line(private["x"], "me/private", "hf auth login")
    offline = client(CATCH + "out['x'] = caught(lambda: open_source('me/never'))", HF_HUB_OFFLINE="1")
    one_line(offline["x"], "me/never", "HF_HUB_OFFLINE")
    unreachable = client(CATCH + "out['x'] = caught(lambda: open_source('me/tiny'))", HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable["x"][:2] == ["ResourceError", 3]
    one_line(unreachable["x"], "me/tiny", "connection", "no local folder has this name")
    (tmp_path / "file").write_text("")
    home = client(CATCH + "out['x'] = caught(lambda: open_source('me/tiny'))", HF_HOME=str(tmp_path / "file" / "home"))
    assert home["x"][:2] == ["ResourceError", 3]
    one_line(home["x"], "me/tiny", "cache cannot be written", str(tmp_path / "file"), "HF_HOME")


def test_a_dropped_connection_is_resumed_where_it_broke(hub, client, tmp_path):
    """Two cuts in a shard cost two more requests, not two more shards; headers that break are asked for again.

    The client keeps what it has of a broken download in steps of 10 MB.
    """
    model = checkpoints.write_llama(tmp_path / "m", shards=2, hidden=1024, inner=4096)
    hub.add_folder("me/tiny", model)
    shard = "model-00001-of-00002.safetensors"
    size = (model / shard).stat().st_size
    assert size > 30 << 20
    hub.cut = {shard: [100, 1]}
    ask = CATCH + "s = open_source('me/tiny')\nout['n'] = len(s.tensors)\n"
    assert client(ask)["n"] == 21
    assert hub.cut[shard][1] == 0
    hub.cut = {shard: [21 << 20, 2]}
    hub.reset_counts()
    assert client(ask + f"out['size'] = s.weight_path({shard!r}).stat().st_size\n")["size"] == size
    assert hub.cut[shard][1] == 0
    sent = sum(r[3] for r in hub.requests if r[1].endswith(shard))
    assert size <= sent < 1.3 * size


def test_a_connection_that_never_holds_ends_in_one_line(hub, client, tmp_path):
    model = checkpoints.write_llama(tmp_path / "m")
    hub.add_folder("me/tiny", model)
    ask = CATCH + "s = open_source('me/tiny')\nhub = None\n"
    hub.cut = {"LICENSE": [0, 10_000]}
    got = client(ask + "out['x'] = caught(lambda: s.open_small('LICENSE'))")["x"]
    assert got[:2] == ["ResourceError", 3]
    one_line(got, "me/tiny/LICENSE", "connection", "run again")


def test_a_server_without_ranges_does_not_get_its_file_read(hub, client, tmp_path):
    """The header is taken from the front of the body and the rest is left unread."""
    model = checkpoints.write_llama(tmp_path / "m", hidden=1024, inner=4096)
    hub.add_folder("me/tiny", model)
    hub.ignore_ranges = True
    got = client("from rehead.checkpoints.opening import open_source\nout['n'] = len(open_source('me/tiny').tensors)")
    assert got["n"] == 21
    assert hub.sent < (model / "model.safetensors").stat().st_size / 2


def test_offline_reads_what_the_cache_holds(hub, client, tmp_path):
    model = checkpoints.write_llama(tmp_path / "m", shards=2)
    sha = hub.add_folder("me/tiny", model)
    client("from huggingface_hub import snapshot_download\nsnapshot_download('me/tiny')")
    hub.reset_counts()
    got = client(
        CATCH + "s = open_source('me/tiny')\nout = {'n': len(s.tensors), 'rev': s.revision, 'small': s.small_files(), "
        "'lic': s.open_small('LICENSE').read().decode()}",
        HF_HUB_OFFLINE="1",
    )
    assert (got["n"], got["rev"], got["lic"]) == (21, sha, "Apache-2.0\n")
    assert "tokenizer.json" in got["small"]
    assert hub.requests == []


def _converted(folder: Path, out: Path, **extra: str) -> Path:
    source = LocalSource(folder)
    entries, fetch = checkpoints.pooled_plan(source)
    with Target(out, source=source, fingerprint="x") as t:
        t.write_weights(entries, fetch, extra.get("max_shard_size", "5GB"))
        t.copy_small_files()
        t.write_text("config.json", json.dumps(source.config))
        t.commit({})
    return out


def test_pushing_again_replaces_rehead_files_and_nothing_else(hub, client, tmp_path):
    model = checkpoints.write_llama(tmp_path / "m")
    split = _converted(model, tmp_path / "split", max_shard_size="30KB")
    whole = _converted(model, tmp_path / "whole")
    hub.add_folder("me/somebody-elses", model)
    broken = _converted(model, tmp_path / "broken")
    (broken / "LICENSE").write_text("MIT-0.00.0\n")
    code = CATCH + "from rehead.checkpoints.push import push_folder\nfrom huggingface_hub import snapshot_download\n"
    code += f"push_folder({str(split)!r}, 'me/out')\npush_folder({str(whole)!r}, 'me/out')\n"
    code += f"snapshot_download('me/out', local_dir={str(tmp_path / 'down')!r})\n"
    code += f"out['foreign'] = caught(lambda: push_folder({str(whole)!r}, 'me/somebody-elses'))\n"
    code += f"out['forbidden'] = caught(lambda: push_folder({str(whole)!r}, 'forbidden/out'))\n"
    code += f"out['broken'] = caught(lambda: push_folder({str(broken)!r}, 'me/broken'))\n"
    got = client(code)
    assert "model.safetensors" in verify_files(tmp_path / "down")["files"]
    assert not list((tmp_path / "down").glob("model-0*"))
    assert got["foreign"][1] == 2
    one_line(got["foreign"], "me/somebody-elses", "choose another")
    assert got["forbidden"][1] == 3
    one_line(got["forbidden"], "forbidden/out", "403")
    assert got["broken"][1] == 4
    one_line(got["broken"], "LICENSE")
    assert "me/broken" not in hub.repos
    got = client(
        CATCH + "from rehead.checkpoints.push import push_folder\n"
        f"out['x'] = caught(lambda: push_folder({str(whole)!r}, 'me/other'))",
        HF_TOKEN="hf_wrong",
    )
    assert got["x"][1] == 3
    one_line(got["x"], "me/other", "401", "hf auth login")


@pytest.mark.slow
def test_an_upload_that_breaks_ends_in_one_line_and_pushing_again_finishes(hub, client, tmp_path):
    whole = _converted(checkpoints.write_llama(tmp_path / "m"), tmp_path / "whole")
    hub.refuse_uploads = True
    push = CATCH + "from rehead.checkpoints.push import push_folder\n"
    push += f"out['x'] = caught(lambda: push_folder({str(whole)!r}, 'me/out'))"
    got = client(push)["x"]
    assert got[:2] == ["ResourceError", 3]
    one_line(got, "me/out", "push again")
    hub.refuse_uploads = False
    assert client(push)["x"] is None
    assert "model.safetensors" in hub.repos["me/out"].commits[-1][1]
