"""Fixtures of the tests of himo, and the packages they need in addition to torch and pytest."""

import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

# A machine with a GPU and no network may have the kernels' needs alone.
NEEDED = ("PIL", "ftfy", "hypothesis", "numpy", "regex", "safetensors", "tqdm")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


class _Skipped(pytest.Module):
    def collect(self) -> list[pytest.Item]:
        pytest.skip(f"the tests of himo need {', '.join(MISSING)}")


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    # Before the module is imported, which is where it would fail.
    return _Skipped.from_parent(parent, path=module_path) if MISSING else None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system of 2 MiB; skips where none can be mounted."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(directory)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("no mount program")
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield directory
    subprocess.run(["umount", str(directory)], check=True, timeout=30)
