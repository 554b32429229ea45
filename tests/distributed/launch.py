"""Starts real processes with torchrun, and reads their results."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WORKERS = Path(__file__).parent


def environment() -> dict[str, str]:
    """One thread for each rank, gloo on the loopback interface, and this checkout's packages."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        # gloo uses the address of the host's name by default, and aborts if it does not resolve.
        "GLOO_SOCKET_IFNAME": "lo",
    }


def torchrun(world: int, *program: str) -> list[str]:
    """The command that runs `program` on this many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}"]
    return [*run, "--master_addr=127.0.0.1", f"--master_port={port}", *program]


def found(
    worker: str, world: int, folder: Path, *arguments: str, **variables: str
) -> list[dict[str, Any]]:
    """The results of each rank of a worker file, in rank order; fails with its output on errors."""
    run = subprocess.run(
        torchrun(world, str(WORKERS / worker), str(folder), *arguments),
        capture_output=True,
        text=True,
        env={**environment(), **variables},
        cwd=ROOT,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "terminate called" not in run.stderr, run.stderr  # gloo prints it when it aborts at exit
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
