"""`himo ablate`: the grid, runs that are done once, and the page with the paper's values."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from train_runs import FLAGS, photos, small_model

from himo.ablate.grid import FULL, LAMBDAS, PAPER_COLUMNS, TAUS, tables
from himo.ablate.page import ablation_page, numbers_csv, read_results
from himo.ablate.runs import Job, as_arguments, claim
from himo.cli import main
from himo.config import TrainConfig
from himo.errors import HimoError
from himo.files import sha256_file


def variants(wanted):
    return {variant.name: variant.flags for table in wanted for _, variant, _ in table.rows}


def test_the_grid_is_that_of_the_paper_and_each_setting_one_variant():
    wanted = tables((4, 5, 6), TAUS, LAMBDAS)
    assert [table.number for table in wanted] == [4, 5, 6]
    assert [len(table.rows) for table in wanted] == [6, 4, 3]
    assert variants(wanted) == {
        "full": {},
        **{f"tau-{tau:g}": {"tau": tau} for tau in (0.6, 0.7, 0.8, 0.85, 0.95)},
        "global": {"lambda_comp": 0.0},
        "component": {"lambda_global": 0.0},
        "both-sides": {"decompose_images": True},
        "lambda-2": {"lambda_comp": 2.0},
        "lambda-0.5": {"lambda_comp": 0.5},
    }
    for table in wanted:
        assert all(len(printed) == len(PAPER_COLUMNS) for _, _, printed in table.rows)
        full = [printed for _, variant, printed in table.rows if variant == FULL]
        assert full == [("93.0 / 93.1", "82.4 / 84.4", "62.2 / 61.9", "97.9", "0.88")]
    # The flags are those of himo train, and of its loss.
    for flags in variants(wanted).values():
        TrainConfig(train_data="x", **flags)


def test_other_values_have_no_printed_ones_and_weight_0_is_the_loss_alone():
    (taus, lambdas) = tables((6, 4), (0.5, 0.9), (0.0, 4.0))
    assert [printed is None for _, _, printed in taus.rows] == [True, False]
    assert [printed for _, _, printed in lambdas.rows] == [None, None]
    assert variants([lambdas]) == {"global": {"lambda_comp": 0.0}, "lambda-4": {"lambda_comp": 4.0}}


def test_values_equal_in_six_digits_have_runs_of_their_own():
    (taus,) = tables((4,), (0.8, 0.80000001), LAMBDAS)
    assert variants([taus]) == {"tau-0.8": {"tau": 0.8}, "tau-0.80000001": {"tau": 0.80000001}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tables", "4,7"), "--tables: expected some of 4, 5 and 6, got 4,7"),
        (("--tables", "4,4"), "--tables: expected each value once, got 4,4"),
        (("--tables", ""), "--tables: expected numbers with commas, got ''"),
        (("--taus", "0.9,0"), r"--taus: expected numbers in \(0, 1\], got 0.9,0"),
        (("--taus", "nan"), r"--taus: expected numbers in \(0, 1\], got nan"),
        (("--taus", "0.9;0.8"), "--taus: expected numbers with commas, got '0.9;0.8'"),
        (("--lambdas", "-1"), "--lambdas: expected finite numbers of at least 0, got -1"),
        (("--lambdas", "inf"), "--lambdas: expected finite numbers of at least 0, got inf"),
        (("--seeds", "1,1"), "--seeds: expected different numbers of at least 0, got 1,1"),
        (("--seeds", "-1"), "--seeds: expected different numbers of at least 0, got -1"),
        (("--batch-size", "1"), "--batch-size: expected at least 2, got 1"),
        (("--devices", "cpu,gpu"), "--devices: the device 'gpu' cannot be used: Expected one of"),
        (("--devices", ""), "--devices: the device '' cannot be used: "),
        ((), "expected a data set to measure on: --eval-data or --val-data"),
        (("--eval-data", "nowhere.csv"), "nowhere.csv"),
        (("--eval-data", "coco:nowhere"), "coco: expected .* in nowhere, which is no folder"),
        (("--eval-data", "cocoa:x"), "--data: expected a path, or NAME:FOLDER of"),
    ],
    ids=str,
)
def test_mistakes_are_one_clear_line(tmp_path, capsys, options, message):
    given = ["ablate", "--train-data", "x.json", "--out", str(tmp_path / "out"), *options]
    assert main(given) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    with pytest.raises(HimoError, match=message):
        raise HimoError(printed)
    assert not (tmp_path / "out").exists()


def test_what_the_grid_sets_is_no_flag_and_no_line_of_a_config(tmp_path, capsys):
    given = ["ablate", "--train-data", "x", "--eval-data", "y", "--out", str(tmp_path / "out")]
    assert main([*given, "--tau", "0.9"]) == 2
    assert "ablate: unknown argument --tau; " in capsys.readouterr().err
    file = tmp_path / "flags.toml"
    file.write_text("lambda_comp = 2.0\n")
    assert main([*given, "--config", str(file)]) == 2
    assert "--lambda-comp: expected none, himo ablate sets it, got 2.0" in capsys.readouterr().err
    assert main([*given, "--fsdp"]) == 2


def test_a_named_set_is_not_read_as_the_training_data(tmp_path, capsys):
    given = ["ablate", "--train-data", "x.csv", "--csv-img-key", "path", "--out", str(tmp_path)]
    assert main([*given, "--eval-data", "coco:nowhere"]) == 2
    assert "coco: expected annotations/captions_val2017.json" in capsys.readouterr().err


def test_flags_of_a_command():
    flags = {"batch_size": 8, "lr": 1e-3, "lock_image": True, "compile": False, "model": None}
    expected = ["--batch-size", "8", "--lr", "0.001", "--lock-image", "--no-compile"]
    assert as_arguments(flags) == expected


def test_a_folder_of_other_settings_is_refused(tmp_path):
    out = tmp_path / "out"
    claim(out, {"train": {"lr": 1e-3}, "eval": ["--data", "x"]})
    claim(out, {"train": {"lr": 1e-3}, "eval": ["--data", "x"]})
    with pytest.raises(HimoError, match="its runs had other train; give them again, or another"):
        claim(out, {"train": {"lr": 1e-4}, "eval": ["--data", "x"]})
    with pytest.raises(HimoError, match="cannot be written"):
        claim(out / "ablation.json", {"train": {}, "eval": []})
    (out / "ablation.json").write_text('{"train": {"lr"')
    with pytest.raises(HimoError, match="ablation.json: not the settings of an ablation"):
        claim(out, {"train": {"lr": 1e-3}, "eval": ["--data", "x"]})


def test_a_run_is_done_when_its_result_is_that_of_its_last_model(tmp_path):
    job = Job(tmp_path / "full-0", [], [])
    assert not job.is_done() and job.model() is None
    (job.folder / "checkpoints").mkdir(parents=True)
    (job.folder / "config.json").write_text(json.dumps({"epochs": 2}))
    (job.folder / "checkpoints" / "epoch_1.safetensors").write_bytes(b"first")
    assert job.model() is None  # one epoch is left
    model = job.folder / "checkpoints" / "epoch_2.safetensors"
    model.write_bytes(b"last")
    assert job.model() == model and not job.is_done()
    job.result.write_text(json.dumps({"model": {"sha256": "0" * 64}}))
    assert not job.is_done()
    job.result.write_text(json.dumps({"model": {"sha256": sha256_file(model)}}))
    assert job.is_done()
    job.result.write_text("{")
    assert not job.is_done()


def result(shift, himo_docci=False):
    values = {"HiMo@2": 60.0, "HiMo@3": 40.0, "HiMo@K": 0.4} | (
        {"HiMo-Docci": 0.7} if himo_docci else {}
    )
    ways = {way: {"R@1": 10.0 + shift} for way in ("image_to_text", "text_to_image")}
    return {
        "retrieval": {**ways, "chance_R@1": 0.2},
        "himo": {name: {"value": value + shift / 100} for name, value in values.items()},
        "histogram": {"K": [4, 4, 6], "rho": [0.2, 0.6, shift / 100]},
    }


def written(folder, wanted, seeds, himo_docci=False):
    folders = {}
    for place, name in enumerate(variants(wanted)):
        folders[name] = [folder / f"{name}-{seed}" for seed in range(seeds)]
        for seed, path in enumerate(folders[name]):
            path.mkdir()
            (path / "config.json").write_text(json.dumps({"seed": seed}))
            (path / "eval.json").write_text(json.dumps(result(place + 2 * seed, himo_docci)))
    return read_results(folders)


def test_the_page_has_both_values_what_is_highest_and_a_table_by_k(tmp_path):
    wanted = tables((4, 5), (0.6, 0.9), LAMBDAS)
    results = written(tmp_path, wanted, seeds=2)
    page = ablation_page(wanted, results, ["Trained on x."], datetime(2026, 1, 1))
    assert "<h1>10 runs, 2 seeds</h1>" in page and "Trained on x." in page
    # The mean of 10 and 12, and the deviation of two values that differ by 2.
    row = page.split('<th scope="row">τ = 0.6</th>')[1].split("</tr>")[0]
    assert row.startswith("<td>11.0 ± 1.4 / 11.0 ± 1.4</td><td>60.0 ± 0.0</td>")
    assert row.endswith("<td>51.4 / 49.4</td><td>98.2</td><td>0.86</td>")
    assert "HiMo@2 is highest with τ = 0.9, in the paper τ = 0.6." in page
    assert "HiMo@K is highest with τ = 0.9, as in the paper." in page
    # K = 4: 0.2 and 0.6 in both runs; K = 6: 0 and 0.02.
    row = page.split("K of HiMo@K</h2>")[1].split('<th scope="row">τ = 0.6</th>')[1]
    assert row.split("</tr>")[0].endswith("<td>0.400</td><td>0.010</td>")
    assert "Captions: 2 of K = 4, 1 of K = 6." in page
    assert "Means and standard deviations over 2 seeds." in page
    lines = numbers_csv(wanted, results).splitlines()
    assert len(lines) == 1 + 2 * (2 + 4)
    assert lines[1] == "4,τ = 0.6,tau-0.6-0,10.0,10.0,60.0,40.0,0.4,"


def test_one_seed_is_said_to_be_one_and_himo_docci_is_compared_where_it_is(tmp_path):
    wanted = tables((6,), TAUS, LAMBDAS)
    results = written(tmp_path, wanted, seeds=1, himo_docci=True)
    page = ablation_page(wanted, results, [], datetime(2026, 1, 1))
    assert "One seed: a difference between two rows may be chance." in page
    assert "±" not in page
    assert '<th scope="col">HiMo@K, HiMo-Docci</th>' in page
    chart = page.split("HiMo@K of table 6, here and in the paper</title>")[1].split("</desc>")[0]
    assert "here: λ = 2 0.700" in chart and "paper: λ = 2 0.880" in chart


@pytest.fixture
def command(tmp_path):
    data = photos(tmp_path)
    flags = [flag for flag in FLAGS if flag not in ("--model", "tiny")]
    shared = ["--train-data", str(data), "--eval-data", str(data), "--tables", "6"]
    shared += ["--lambdas", "1,2", "--devices", "cpu,cpu", "--out", str(tmp_path / "out")]
    return ["ablate", *shared, *flags, *small_model(tmp_path)]


def times(out: Path) -> dict[str, int]:
    return {
        str(path): path.stat().st_mtime_ns
        for path in (out / "runs").rglob("*")
        if path.name in ("metrics.jsonl", "eval.json")
    }


@pytest.mark.slow
@pytest.mark.timeout(900)  # eight processes, each of which imports torch
def test_a_finished_run_is_not_repeated_and_a_stopped_one_goes_on(command, tmp_path, capsys):
    out = tmp_path / "out"
    metrics = [out / "runs" / f"{name}-0" / "metrics.jsonl" for name in ("full", "lambda-2")]
    process = subprocess.Popen([sys.executable, "-m", "himo", *command, "--epochs", "40"])
    try:
        deadline = time.monotonic() + 300
        while not all(path.exists() and path.read_text().count("\n") > 3 for path in metrics):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=200)
    assert status == 130
    assert not list(out.rglob("eval.json"))
    before = [path.read_text().splitlines() for path in metrics]

    assert main([*command, "--epochs", "40"]) == 0
    for path, lines in zip(metrics, before, strict=True):
        assert path.read_text().splitlines()[: len(lines)] == lines  # it went on
    assert (out / "ablation.html").exists() and len(times(out)) == 4
    capsys.readouterr()
    finished = times(out)
    os.remove(out / "runs" / "lambda-2-0" / "eval.json")
    assert main([*command, "--epochs", "40"]) == 0
    assert "2 runs, 1 done before" in capsys.readouterr().out
    again = times(out)
    differ = [path for path in finished if again[path] != finished[path]]
    assert differ == [str(out / "runs" / "lambda-2-0" / "eval.json")]  # trained once, measured anew
    assert main([*command, "--epochs", "41"]) == 2
    assert "its runs had other train" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_last_words(command, tmp_path, capsys):
    assert main([*command, "--train-data", str(tmp_path / "missing.csv")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    # The first of the two; the second has the same words.
    assert re.search(
        r"runs/(\S+): failed: .*missing\.csv.*runs/\1\.log\), and 1 more failed", error
    )
