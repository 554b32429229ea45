"""`himo train` under torchrun: steps equal one process's, and all ranks end together (G23, G24)."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from card_runs import Ranks, alone, arguments, assert_equal_weights, cards, losses, rows, weights
from launch import ROOT, WORKERS, environment, found, torchrun

REPEATS = int(os.environ.get("HIMO_TEST_REPEATS", "1"))  # kills at random times; set to 20 by hand
TEN_EPOCHS = ["--epochs", "10", "--save-frequency", "10"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return cards(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def twenty_steps(pairs, tmp_path_factory) -> Path:
    """One process x 128, 10 epochs of two steps."""
    return alone(pairs, tmp_path_factory.mktemp("alone"), "--batch-size", "128", *TEN_EPOCHS)


@pytest.mark.parametrize("repeat", range(REPEATS))
@pytest.mark.slow
def test_two_processes_killed_and_resumed_take_the_steps_of_one(
    repeat, pairs, twenty_steps, tmp_path, generator
):
    flags = ["--batch-size", "64", *TEN_EPOCHS, "--save-every-n-steps", "5"]
    ranks = Ranks(2, pairs, tmp_path / "logs", *flags)
    ranks.wait_for("run/checkpoints/state-00000005*")
    victim = int(torch.randint(2, (), generator=generator))
    process = ranks.process_of(victim)
    time.sleep(float(torch.rand((), generator=generator)) / 2)  # within a step, or while saving
    start = time.monotonic()
    os.kill(process, signal.SIGKILL)
    output = ranks.end(status=None)
    assert time.monotonic() - start < 30
    assert f"rank {victim} (process {process} on " in output and "ended without a word" in output
    assert "terminate called" not in output

    assert "done" in Ranks(2, pairs, tmp_path / "logs", *flags, "--resume", "latest").end()
    assert losses(tmp_path / "logs") == pytest.approx(losses(twenty_steps), rel=1e-5)
    assert_equal_weights(tmp_path / "logs", twenty_steps, epoch=10)


@pytest.mark.slow
def test_a_run_that_torchrun_restarts_goes_on_where_it_was(pairs, twenty_steps, tmp_path):
    flags = ["--batch-size", "64", *TEN_EPOCHS, "--save-every-n-steps", "5", "--resume", "latest"]
    ranks = Ranks(2, pairs, tmp_path / "logs", *flags, launch=("--max-restarts=1",))
    ranks.wait_for("run/checkpoints/state-00000005*")
    os.kill(ranks.process_of(0), signal.SIGKILL)  # the process that owns the run's folder
    output = ranks.end()
    assert "ended without a word" in output and "done" in output
    assert losses(tmp_path / "logs") == pytest.approx(losses(twenty_steps), rel=1e-5)
    assert_equal_weights(tmp_path / "logs", twenty_steps, epoch=10)


@pytest.mark.slow
def test_accumulation_around_a_ring_with_nothing_left_for_some_ranks(pairs, tmp_path):
    # 256 pairs in batches of 3 x 42, made 14 at a time: the third step has 4, all rank 0's. eps is
    # so large that Adam's first steps are proportional to the gradients, not all of one length.
    flags = ["--keep-last-batch", "--epochs", "1", "--eps", "1e-4", "--lr", "1e-2"]
    expected = alone(pairs, tmp_path / "alone", "--batch-size", "126", *flags)
    ranks = ["--batch-size", "14", "--accum-freq", "3", "--exchange", "ring"]
    Ranks(3, pairs, tmp_path / "ranks", *ranks, *flags).end()
    assert losses(tmp_path / "ranks") == pytest.approx(losses(expected), rel=1e-5)
    assert len(losses(expected)) == 3
    assert_equal_weights(tmp_path / "ranks", expected, epoch=1)


@pytest.mark.slow
def test_a_rank_that_raises_ends_all_with_its_reason(pairs, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for file in pairs.parent.iterdir():
        (photos / file.name).symlink_to(file)
    (photos / "7.png").unlink()
    (photos / "7.png").write_bytes((pairs.parent / "7.png").read_bytes()[:200])
    start = time.monotonic()
    flags = ["--batch-size", "16", "--max-bad-fraction", "0", "--follow-links"]
    output = Ranks(2, photos / "pairs.csv", tmp_path / "logs", *flags).end(status=None)
    assert time.monotonic() - start < 60
    said = [line for line in output.splitlines() if "himo: error: rank" in line]
    limit = "the limit is 0 % (--max-bad-fraction)"
    reason = f"too many bad samples, {limit}: 1 of 256 samples could not be read"
    (first,) = {
        line.partition("himo: error: ")[2][:6] for line in said if "ends because" not in line
    }
    assert all(reason in line for line in said) and len(said) == 2
    other = "rank 1" if first == "rank 0" else "rank 0"
    assert any(f"{other}: ends because of {first}: too many" in line for line in said)
    assert not list(tmp_path.rglob("epoch_*"))


@pytest.mark.slow
def test_a_stopped_rank_is_missed_and_killed(pairs, tmp_path):
    flags = ["--batch-size", "32", "--epochs", "1000", "--rank-timeout", "4"]
    ranks = Ranks(2, pairs, tmp_path / "logs", *flags)
    ranks.wait_for("run/metrics.jsonl")
    victim = ranks.process_of(1)
    start = time.monotonic()
    os.kill(victim, signal.SIGSTOP)
    output = ranks.end(status=None)
    assert time.monotonic() - start < 30  # torchrun alone kills it after 30 s more
    assert f"rank 1 (process {victim} on " in output
    assert "gave no sign of life for 4 s" in output
    assert not Path(f"/proc/{victim}").exists()


@pytest.mark.parametrize("count", [1, 10])
@pytest.mark.slow
def test_a_step_that_is_nan_on_one_rank_is_skipped_by_all(count, pairs, tmp_path):
    # From the third step on, one rank's features are NaN for this many steps.
    flags = ["--batch-size", "32", "--epochs", "4", "--on-nonfinite", "skip"]
    run = torchrun(2, str(WORKERS / "nan_worker.py"), str(count), "--")
    done = subprocess.run(
        [*run, *arguments(pairs, tmp_path, *flags)],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=240,
    )
    output = done.stdout + done.stderr
    for step in range(3, 3 + min(count, 9)):
        assert output.count(f"step {step}: skipped, the gradient is nan") == 1, output
    if count == 10:
        assert done.returncode
        assert "step 12: the gradient is nan, as in the 9 steps before" in output
        assert not list(tmp_path.rglob("epoch_4*"))
        return
    assert done.returncode == 0, output
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, *range(4, 17)]
    assert [row["skipped_steps"] for row in rows(tmp_path)] == [0, 0, 1] + [0] * 12
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path, 4).values())


@pytest.mark.slow
def test_a_script_whose_rank_has_another_width_ends_with_its_number(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "from himo_kernels.nn import HiMoLoss\n"
        "dist.init_process_group('gloo')\n"
        "x = torch.randn(8, 7 if dist.get_rank() == 1 else 6)\n"
        "HiMoLoss()(x, x, 1.0)\n"
    )
    start = time.monotonic()
    done = subprocess.run(
        torchrun(2, str(script)), capture_output=True, text=True, env=environment(), timeout=240
    )
    assert done.returncode and time.monotonic() - start < 60
    assert "one width on every rank, got 7 on rank 1 and 6 on rank 0" in done.stderr


@pytest.mark.slow
def test_a_stop_request_stops_all_ranks_after_the_same_step(pairs, tmp_path):
    ranks = Ranks(2, pairs, tmp_path / "logs", "--batch-size", "32", "--epochs", "1000")
    ranks.wait_for("run/metrics.jsonl")
    os.kill(ranks.process_of(1), signal.SIGTERM)
    output = ranks.end(status=None)
    assert "go on with --resume latest" in output
    (state,) = (tmp_path / "logs/run/checkpoints").glob("state-*")
    assert f"stopped at step {int(state.stem.partition('-')[2])};" in output


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--batch-size", "200"], "256 samples do not fill one batch of 200 on each of 2"),
        (
            ["--batch-size", "16", "--lr", "1e30", "--warmup", "0"],
            "to be finite, got nan at [0, 0]",
        ),
    ],
    ids=["too few samples", "a loss that diverges"],
)
@pytest.mark.slow
def test_what_is_wrong_for_all_is_said(flags, words, pairs, tmp_path):
    output = Ranks(2, pairs, tmp_path / "logs", *flags).end(status=None)
    assert words in output and f'File "{ROOT}/himo' not in output  # no traceback of ours


@pytest.mark.slow
def test_lost_patience_ends_all_ranks(pairs, tmp_path):
    flags = ["--batch-size", "31", "--epochs", "3", "--lr", "0", "--held-out", "8"]
    output = Ranks(2, pairs, tmp_path / "two", *flags, "--patience", "1").end()
    assert output.count("no better R@1 in 1 validations, --patience 1: the run ends") == 1
    assert (tmp_path / "two/run/checkpoints/epoch_2.safetensors").exists()
    assert not (tmp_path / "two/run/checkpoints/epoch_3.safetensors").exists()


@pytest.mark.slow
def test_a_validation_between_two_log_lines_is_logged_by_all_ranks(pairs, tmp_path):
    # Rank 0 validates after step 3. The line has means over ranks, so the other ranks take part.
    flags = ["--batch-size", "40", "--epochs", "2", "--held-out", "16"]
    Ranks(2, pairs, tmp_path, *flags, "--log-every-n-steps", "100").end()
    assert [row["step"] for row in rows(tmp_path)] == [1, 3, 6]
    validated = ["val_image_to_text_R@1" in row for row in rows(tmp_path)]
    assert validated == [False, True, True]


@pytest.mark.slow
def test_compiled_towers_are_one_graph_with_the_gradient_of_ddp(tmp_path):
    for result in found("compiled_worker.py", 2, tmp_path):
        assert result["graphs"] == 1 and max(result["errors"]) < 1e-5
