"""The schema of rehead.json, and manifests of earlier versions: read, verified, resumed."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers

from rehead.checkpoints import manifest
from rehead.checkpoints.manifest import completed, read_manifest, verify_files
from rehead.checkpoints.manifest_schema import Manifest
from rehead.convert import convert, verify
from rehead.errors import VerificationError

OLD = Path(__file__).with_name("manifests")
MADE = {
    "pooled": ("llama", {"num_key_value_heads": 2}),
    "host": ("gpt_neox", {"host": "phi"}),
    "everything": ("llama", {
        "num_key_value_heads": 2, "block": "parallel", "layers": "1", "reinvest": "ffn", "multiple_of": 8,
        "dtype": "bfloat16",
    }),
}  # fmt: skip


def aged(name: str, folder: Path) -> Path:
    """A conversion under the manifest that version 0.1 wrote of the same: its text, with the hashes of these files."""
    model, options = MADE[name]
    tiny.save_tiny(model, folder / "source")
    convert(folder / "source", folder / "out", **options)
    old = json.loads((OLD / f"{name}.json").read_text())
    for path in (folder / "out").glob("modeling_*.py"):  # was a single file then, which imported nothing beside it
        path.write_text(path.read_text().replace("from .", "# from ."))
        if path.name not in old["files"]:
            path.unlink()
    for file in old["files"]:
        data = (folder / "out" / file).read_bytes()
        old["files"][file] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "out" / "rehead.json").write_text(json.dumps(old, indent=1) + "\n")
    return folder / "out"


def test_versions_are_the_libraries_own_and_import_neither() -> None:
    code = (
        "import json, sys; from rehead.checkpoints.manifest import versions; told = versions();"
        "print(json.dumps([told, sorted({'torch', 'transformers'} & set(sys.modules))]))"
    )
    told, imported = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    assert imported == []
    assert told == {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__
    }  # fmt: skip


def test_a_version_is_the_librarys_own_word_wherever_it_stands(tmp_path: Path, monkeypatch) -> None:
    files = {
        "of_a_build": ("version.py", "cuda = '1'\n__version__ = '1.2+cu1'\n", "from .version import __version__\n"),
        "plain": ("__init__.py", '__version__ = "3.4"\n', '__version__ = "3.4"\n'),
        "computed": ("other.py", "", "__version__ = '.'.join('56')\n"),
    }
    for name, (file, text, first) in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(first)
        (tmp_path / name / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert {name: manifest._version(name) for name in files} == {
        "of_a_build": "1.2+cu1",
        "plain": "3.4",
        "computed": "5.6",
    }
    assert {name for name in files if name in sys.modules} == {"computed"}


@pytest.mark.parametrize("name", MADE)
def test_a_manifest_of_an_earlier_version_still_verifies(name: str, tmp_path: Path) -> None:
    out = aged(name, tmp_path)
    assert "cache_bytes" not in read_manifest(out)
    assert verify(out, str(tmp_path / "source")).files == len(verify_files(out)["files"])


@pytest.mark.parametrize("name", MADE)
def test_a_run_that_an_earlier_version_finished_is_found_done(name: str, tmp_path: Path) -> None:
    out = aged(name, tmp_path)
    fingerprint = json.loads((OLD / f"{name}.json").read_text())["fingerprint"]
    table = completed(out, fingerprint)
    assert table is not None
    assert {int(layer) for layer in table["layers"]} <= {0, 1}
    assert completed(out, "another") is None


@pytest.mark.parametrize("name", MADE)
def test_what_is_written_now_has_every_field_of_then(name: str, tmp_path: Path) -> None:
    old = json.loads((OLD / f"{name}.json").read_text())
    model, options = MADE[name]
    tiny.save_tiny(model, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", **options)
    new = json.loads((tmp_path / "out" / "rehead.json").read_text())
    assert old.keys() <= new.keys()
    assert new.keys() <= Manifest.model_fields.keys()
    assert old["config_changes"].items() <= new["config_changes"].items()
    same = ("model_type", "num_key_value_heads", "parameters", "exact")
    assert {key: new[key] for key in same} == {key: old[key] for key in same}
    assert set(new["changed_tensors"]) <= set(old["changed_tensors"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"exact": "yes"}, "exact"),
        ({"num_key_value_heads": {"before": 4}}, "num_key_value_heads.after"),
        ({"layers": [1]}, "layers"),
        ({"kv_bytes_per_token": {"before": 1, "after": 1.5}}, "kv_bytes_per_token.after"),
        ({"versions": "2.13"}, "versions"),
    ],
)
def test_a_field_of_another_form_is_named(change: dict, said: str, tmp_path: Path) -> None:
    table = json.loads((OLD / "pooled.json").read_text()) | change
    (tmp_path / "rehead.json").write_text(json.dumps(table))
    with pytest.raises(VerificationError, match=said) as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_field_that_this_version_does_not_know_is_kept(tmp_path: Path) -> None:
    table = json.loads((OLD / "pooled.json").read_text()) | {"later": {"a": 1}}
    (tmp_path / "rehead.json").write_text(json.dumps(table))
    assert read_manifest(tmp_path)["later"] == {"a": 1}
