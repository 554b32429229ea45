"""`himo train --fsdp`: the steps, files and ends of a run whose processes share out the weights."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from card_runs import Ranks, alone, arguments, assert_close, cards, losses, rows
from launch import ROOT, WORKERS, environment, found, torchrun
from torch import Tensor
from train_runs import refused

import himo
from himo.checkpoint.safetensors_files import read_safetensors

FSDP = "--fsdp"
# Two epochs of two steps of 32 pairs, and states of the last three steps.
FOUR_STEPS = ["--batch-size", "16", "--epochs", "2", "--train-num-samples", "64", "--ema", "0.5"]
FOUR_STEPS += ["--held-out", "8", "--grad-clip-norm", "0.5"]
FOUR_STEPS += ["--save-every-n-steps", "3", "--keep-checkpoints", "0"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return cards(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def sharded(pairs, tmp_path_factory) -> Path:
    """Two processes x 16."""
    logs = tmp_path_factory.mktemp("sharded") / "logs"
    assert "2 processes" in Ranks(2, pairs, logs, *FOUR_STEPS, FSDP).end()
    return logs


def state_path(logs: Path, step: int) -> Path:
    return logs / f"run/checkpoints/state-{step:08d}.safetensors"


def state(logs: Path, step: int) -> dict[str, Tensor]:
    with open(state_path(logs, step), "rb") as file:
        tensors, _ = read_safetensors(file, file.name)
    return tensors


def assert_equal_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.slow
def test_two_processes_take_the_steps_and_write_the_files_of_one(pairs, sharded, tmp_path):
    one = [*FOUR_STEPS, "--batch-size", "32"]
    alone(pairs, tmp_path, *one)
    for actual, expected in zip(rows(sharded), rows(tmp_path), strict=True):
        for name in ("loss", "component_loss", "grad_norm", "logit_scale"):
            assert actual[name] == pytest.approx(expected[name], rel=1e-5), name
        validated = [name for name in expected if name.startswith("val_")]
        assert [actual[name] for name in validated] == [expected[name] for name in validated]
        assert expected["grad_norm"] > 0.5
    assert_close(state(sharded, 4), state(tmp_path, 4))
    for name in ("epoch_2", "best"):
        (model, _), (expected_model, _) = (
            himo.load(logs / f"run/checkpoints/{name}.safetensors") for logs in (sharded, tmp_path)
        )
        assert_close(model.state_dict(), expected_model.state_dict())
    averages = {
        name.removeprefix("average/"): tensor
        for name, tensor in state(sharded, 4).items()
        if name.startswith("average/")
    }
    averages.pop("positional_embedding_res")  # without its rows that are never read, in a model
    saved, _ = himo.load(sharded / "run/checkpoints/epoch_2.safetensors")
    assert_equal_bits(averages, {name: saved.state_dict()[name] for name in averages})


@pytest.mark.slow
def test_a_killed_run_ends_and_resumes_to_the_bit(pairs, sharded, tmp_path):
    logs = tmp_path / "logs"
    ranks = Ranks(2, pairs, logs, *FOUR_STEPS, FSDP)
    ranks.wait_for("run/checkpoints/state-00000002*")
    process = ranks.process_of(1)
    start = time.monotonic()
    os.kill(process, signal.SIGKILL)
    output = ranks.end(status=None)
    assert time.monotonic() - start < 30
    assert f"rank 1 (process {process} on " in output and "ended without a word" in output
    assert "terminate called" not in output
    assert "done" in Ranks(2, pairs, logs, *FOUR_STEPS, FSDP, "--resume", "latest").end()
    assert_equal_bits(state(logs, 4), state(sharded, 4))


@pytest.mark.slow
def test_a_run_goes_on_without_fsdp_and_with_it_again(pairs, sharded, tmp_path):
    plain, again = tmp_path / "plain", tmp_path / "again"
    output = Ranks(2, pairs, plain, *FOUR_STEPS, "--resume", str(state_path(sharded, 2))).end()
    assert "--fsdp False (before True)" in output
    resume = ["--resume", str(state_path(plain, 3))]
    output = Ranks(2, pairs, again, *FOUR_STEPS, FSDP, *resume).end()
    assert "--fsdp True (before False)" in output
    for logs in (plain, again):
        assert_close(state(logs, 4), state(sharded, 4))


@pytest.mark.slow
def test_ranks_whose_last_batches_take_other_numbers_of_parts(pairs, tmp_path):
    # 186 pairs in batches of 3 x 42, made 14 at a time: the second step has 42, 18 and no pairs.
    # eps is so large that Adam's first steps are proportional to the gradients.
    flags = ["--keep-last-batch", "--epochs", "1", "--eps", "1e-4", "--lr", "1e-2"]
    flags += ["--train-num-samples", "186", "--warmup", "1"]
    flags += ["--lock-text", "--lock-text-unlocked-layers", "2"]
    alone(pairs, tmp_path / "alone", "--batch-size", "126", *flags)
    split = ["--batch-size", "14", "--accum-freq", "3", "--exchange", "ring"]
    Ranks(3, pairs, tmp_path / "ranks", *split, *flags, FSDP, "--grad-checkpointing").end()
    assert losses(tmp_path / "ranks") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert len(losses(tmp_path / "alone")) == 2
    assert_close(state(tmp_path / "ranks", 2), state(tmp_path / "alone", 2))


@pytest.mark.slow
def test_a_step_that_is_nan_on_one_rank_changes_no_weight(pairs, tmp_path):
    flags = [*FOUR_STEPS, "--on-nonfinite", "skip", FSDP]
    run = torchrun(2, str(WORKERS / "nan_worker.py"), "1", "--", *arguments(pairs, tmp_path))
    done = subprocess.run(
        [*run, *flags], capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=240
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert output.count("step 3: skipped, the gradient is nan") == 1
    before, skipped, after = (state(tmp_path, step) for step in (2, 3, 4))
    changing = [name for name in before if "step" not in name and "random" not in name]
    assert all(torch.equal(before[name], skipped[name]) for name in changing)
    assert all(tensor.isfinite().all() for tensor in after.values())


@pytest.mark.slow
def test_each_rank_holds_half_and_has_the_gradient_of_ddp(tmp_path):
    for rank, result in enumerate(found("sharded_worker.py", 2, tmp_path)):
        for name in ("fp32", "amp"):
            assert result[name]["gradient"] < 1e-5 and result[name]["norm"] < 1e-5
            assert result[name]["clipped"] and result[name]["clipped gradient"] < 1e-5
        # Only the scaler looks at the gradient; an infinity on one rank stops the step of both.
        assert result["fp32"]["changed"] and not result["amp"]["changed"]
        assert result["amp"]["scale"] == 128
        held = result["held"]
        assert held["scale"] == pytest.approx(100)
        assert all(share < 0.51 for share in held["shares"].values()), held
        assert held["equal"] and held["shapes"] and held["copy"] == (rank == 0)


def test_what_fsdp_cannot_do_is_refused(pairs, tmp_path, capsys):
    message = refused(capsys, pairs, tmp_path, FSDP, "--compile")
    assert message == "himo: error: --fsdp: expected no --compile beside it"
    message = refused(capsys, pairs, tmp_path, FSDP)
    start = "torchrun --nproc_per_node 8 -m -- himo train ..."
    assert message.endswith(f"--fsdp: expected several processes, as `{start}` starts them, got 1")
