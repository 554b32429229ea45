"""One owner of a run's folder, with real processes, and the removal of what killed saves left."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from train_runs import ROOT, command, lines, photos, refused, train

from himo.errors import HimoError
from himo.files import atomic_path, hidden_directory, hidden_path, remove_abandoned
from himo.run_folder import owned
from himo.training_state import saved_states


@contextmanager
def another_owner(folder: Path, *, child_s: float = 0.0) -> Iterator[int]:
    """A process that owns the folder until it is killed, or the body ends; yields its id.

    Args:
        child_s: it has a child, as one that reads data, which lives on for so long.
    """
    ready, tell = os.pipe()
    process = os.fork()
    if process == 0:
        with owned(folder):
            if child_s and os.fork() == 0:
                time.sleep(child_s)
                os._exit(0)
            os.write(tell, b"x")
            time.sleep(60)
        os._exit(0)
    assert os.read(ready, 1) == b"x"
    try:
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(ready)
        os.close(tell)


def test_a_folder_has_one_owner_who_is_named(tmp_path):
    with another_owner(tmp_path / "logs/run") as process:
        message = rf"logs/run: in use by process {process} on .*: let it end, or .* another --name"
        with pytest.raises(HimoError, match=message), owned(tmp_path / "logs/run", 0):
            pytest.fail("the body ran")
        assert os.listdir(tmp_path / "logs/run") == ["run.lock"]  # still the owner's


def test_the_kernel_gives_back_what_a_killed_owner_had(tmp_path):
    with another_owner(tmp_path, child_s=3) as process:
        os.kill(process, signal.SIGKILL)
        with owned(tmp_path):  # waits for a dying one, not for its children
            assert f"process {os.getpid()} on" in (tmp_path / "run.lock").read_text()
    assert os.listdir(tmp_path) == []


def test_a_folder_that_stays_empty_is_taken_away_again(tmp_path):
    with pytest.raises(KeyError), owned(tmp_path / "logs/run"):
        raise KeyError
    assert os.listdir(tmp_path) == []
    (tmp_path / "logs").mkdir()
    with owned(tmp_path / "logs/run"):
        (tmp_path / "logs/run/metrics.jsonl").touch()
    assert os.listdir(tmp_path / "logs/run") == ["metrics.jsonl"]


def test_two_folders_do_not_meet(tmp_path):
    with another_owner(tmp_path / "a"), owned(tmp_path / "b", 0):
        assert (tmp_path / "b/run.lock").exists()


def test_a_folder_by_another_path_is_the_same(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with (
        another_owner(tmp_path / "run"),
        pytest.raises(HimoError, match="in use by process"),
        owned(tmp_path / "link", 0),
    ):
        pytest.fail("the body ran")


@pytest.mark.parametrize("restarts, taken", [("0", False), ("1", True)])
@pytest.mark.slow
def test_a_restarted_run_waits_longer_for_the_one_before(restarts, taken, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    with another_owner(tmp_path) as process:
        killer = subprocess.Popen(["sh", "-c", f"sleep 3; kill -9 {process}"])
        try:
            with owned(tmp_path):
                assert taken
        except HimoError:
            assert not taken
        killer.wait()


def test_without_locks_a_run_goes_on_and_says_so_and_removes_nothing(tmp_path, monkeypatch, capsys):
    # Every file system here has locks, so the call that asks for one is replaced.
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    left = hidden_path(tmp_path)
    left.touch()
    with owned(tmp_path):
        pass
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "has no locks (No locks available)" in said
    assert os.listdir(tmp_path) == [left.name]


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("kept")
    folder = tmp_path / "run"
    folder.mkdir()
    hidden_path(folder).write_bytes(b"12345")
    hidden_path(folder).touch()
    hidden_path(folder).symlink_to(outside)
    (killed := hidden_path(folder)).mkdir()  # the directory of a safetensors file in the making
    (killed / "library's own").write_bytes(b"123")
    os.mkfifo(hidden_path(folder))
    for name in (".himo-1.tmp", ".himo-0123456789abcdeF.tmp", "x.himo-0123456789abcdef.tmp"):
        (folder / name).touch()
    before = set(os.listdir(folder))
    with atomic_path(folder / "eval.json") as temporary:  # of an evaluation that runs meanwhile
        with hidden_directory(folder) as beside:
            assert remove_abandoned(folder) == (3, 8)
            assert temporary.exists() and beside.is_dir()
        temporary.write_text("whole")
    assert (folder / "eval.json").read_text() == "whole" and outside.read_text() == "kept"
    assert len(before & set(os.listdir(folder))) == len(before) - 3
    assert remove_abandoned(folder) == (0, 0)
    assert remove_abandoned(tmp_path / "nowhere") == (0, 0)


def test_a_file_taken_for_abandoned_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    lock, taken = fcntl.flock, []

    def sweep_first(descriptor, operation):
        if not taken:
            taken.append(remove_abandoned)
            monkeypatch.setattr(fcntl, "flock", lock)
            taken.append(remove_abandoned(tmp_path))
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", sweep_first)
    with atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("whole")
    assert taken[1] == (1, 0)
    assert os.listdir(tmp_path) == ["file"]


# Whole runs.


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return photos(tmp_path_factory.mktemp("photos"))


@pytest.mark.slow
def test_a_run_in_a_folder_in_use_writes_nothing(pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("himo.run_folder._WAIT_S", 0)
    with another_owner(tmp_path / "run") as process:
        before = sorted(os.listdir(tmp_path / "run"))
        assert f"in use by process {process} on" in refused(capsys, pairs, tmp_path)
        assert sorted(os.listdir(tmp_path / "run")) == before == ["run.lock"]


@pytest.mark.slow
def test_of_two_runs_of_one_name_one_trains(pairs, tmp_path):
    runs = [
        subprocess.Popen(
            command(pairs, tmp_path, *flags),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for flags in (["--seed", "0"], ["--seed", "1"])
    ]
    output = [run.communicate(timeout=240) for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], output
    winner, loser = sorted((0, 1), key=lambda number: runs[number].returncode)
    said = output[loser][1].strip()
    assert said.startswith(f"himo: error: {tmp_path}/run: in use by process {runs[winner].pid} on")
    assert "\n" not in said and output[loser][0] == ""
    assert [row["step"] for row in lines(tmp_path)] == list(range(1, 7))
    assert "done" in output[winner][0]


@pytest.mark.slow
def test_the_files_of_a_killed_save_are_removed_at_the_next_start(pairs, tmp_path):
    checkpoints = tmp_path / "run/checkpoints"
    flags = ["--save-every-n-steps", "1", "--epochs", "50", "--workers", "1"]
    process = subprocess.Popen(
        command(pairs, tmp_path, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    left: list[Path] = []
    while not left:  # stopped at a moment of chance, until that is one within a save
        assert process.poll() is None and time.monotonic() < deadline
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        left = list(checkpoints.glob(".himo-*.tmp")) if saved_states(checkpoints) else []
        if not left:
            process.send_signal(signal.SIGCONT)
            time.sleep(0.01)
    process.kill()
    process.wait()
    assert list(checkpoints.glob(".himo-*.tmp")) == left
    # At once: the process that read data for it may live on. The removal is the owner's, before
    # anything else can be wrong with the run.
    flags = ["--resume", "latest", "--epochs", "50", "--lr", "5"]
    done = train(pairs, tmp_path, *flags, status=2)
    # The file of the state, and perhaps the file of its tensors.
    assert re.search(r"removed [12] unfinished files of killed saves", done.stdout)
    assert "--lr 0.001 as it began" in done.stderr
    assert not list(tmp_path.rglob(".himo-*")) and not list(tmp_path.rglob("*.lock"))
