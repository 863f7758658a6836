"""Two processes of torch.distributed on this machine."""

from __future__ import annotations

import os
import subprocess
import sys

#: Ends a worker once both are done. One run in twenty aborted in gloo's threads while the interpreter took them down,
#: so a worker is left without that.
LEAVE = """
import os, torch
torch.distributed.barrier()
os._exit(0)
"""


def torchrun(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script or module as two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    path = os.pathsep.join(filter(None, (os.path.dirname(__file__), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    return subprocess.run([*launch, *command], capture_output=True, text=True, timeout=240, env=env)
