"""Runs Python in a fresh process, for tests that depend on earlier imports or calls."""

import os
import subprocess
import sys
from pathlib import Path

import himo_kernels

PACKAGE = Path(himo_kernels.__file__).parent


def run_python(*arguments: str, **environment: str) -> str:
    """Returns the stripped output of `python *arguments`. Fails with its errors if it fails.

    It inherits the environment, with `environment` over it, and finds this himo_kernels.
    """
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()
