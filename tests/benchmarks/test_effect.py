"""`make effect`: its towers, runs that go on, and differences with intervals, against hand-worked
cases and other formulas."""

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from itertools import chain

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from train_runs import ROOT

from benchmarks import effect, effect_rows
from benchmarks.effect import (
    RATES,
    SEEDS,
    Job,
    Setting,
    Towers,
    data,
    jobs_of,
    measures,
    run,
    run_all,
)
from benchmarks.effect_rows import (
    MEASURES,
    METHODS,
    best_rate,
    comparisons,
    comparisons_csv,
    effect_page,
    paired,
    runs_csv,
)
from himo.config import TrainConfig
from himo.evaluate.himo_k import MORE_THAN
from himo.objective import Objective
from himo.synth import draw_scenes
from himo.synth.scenes import Scene, Thing
from himo_kernels import pca

SMALL = Setting(
    scenes=200, held_out=12, width=16, embed_dim=16, batch_size=16, start_steps=10, steps=6
)


def test_the_interval_is_students_t_of_the_paired_differences():
    # Differences 1, 2, 3: mean 2, deviation 1, and 4.303 for two degrees of freedom.
    difference, interval = paired([3, 5, 9], [2, 3, 6])
    assert difference == 2 and interval == pytest.approx(4.303 / math.sqrt(3))
    assert paired([3], [1])[0] == 2 and math.isnan(paired([3], [1])[1])


def test_the_quantiles_hold_95_percent():
    for degrees, quantile in effect_rows._T.items():
        t = np.linspace(-quantile, quantile, 200_001)
        scale = (
            math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
        )
        density = scale * (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
        assert np.trapezoid(density, t) == pytest.approx(0.95, abs=2e-4)
    assert len(SEEDS) - 1 in effect_rows._T


def results(rates=(1e-4, 1e-3), seeds=(0, 1, 2)):
    """Runs whose measures are a sum over method, rate and seed; the best rates differ by method."""
    found = {}
    for seed in seeds:
        found["", 0.0, seed] = {"rank": 20, "compare": dict.fromkeys(MEASURES, 1.0)}
        for at, lr in enumerate(rates):
            for place, method in enumerate(METHODS):
                value = 10.0 * place + 100 * (at == place % 2) + seed * (place + 1)
                found[method, lr, seed] = {
                    "rank": 30 + place,
                    "choose": dict.fromkeys(MEASURES, value),
                    "compare": dict.fromkeys(MEASURES, 1000 + value),
                }
    return found


def test_a_method_is_compared_at_each_rate_and_each_at_its_own_best():
    found = comparisons(results())
    assert len(found) == 3 * len(MEASURES) * 3  # three methods; two rates and the best ones
    one = {(c.method, c.rates, c.lr): c for c in found if c.measure == "HiMo@K"}
    assert best_rate(results(), "clip", "R@1") == 1e-4
    assert best_rate(results(), "paper-0.9", "R@1") == 1e-3
    # paper-0.9 against CLIP at 1e-4, by seed: 10 - 100 + (0, 1, 2).
    equal = one["paper-0.9", "equal", 1e-4]
    assert (equal.baseline, equal.baseline_lr) == ("clip", 1e-4)
    assert equal.difference == -89 and equal.interval == pytest.approx(4.303 / math.sqrt(3))
    assert equal.verdict == "lower" and (equal.rank, equal.baseline_rank) == (31, 30)
    own = one["paper-0.9", "own best", 1e-3]
    assert own.baseline_lr == 1e-4 and own.difference == 11 and own.verdict == "higher"
    assert own.mean - own.baseline_mean == own.difference
    assert one["official", "equal", 1e-4].baseline == "official-clip"


def test_a_difference_within_its_interval_and_one_seed_are_not_separated():
    alike = dataclasses.replace(comparisons(results())[0], difference=1.0, interval=1.5)
    assert alike.verdict == "not separated"
    assert {one.verdict for one in comparisons(results(seeds=(0,)))} == {"not separated"}


def test_the_best_rate_is_chosen_on_other_scenes_than_those_compared_on():
    found = results()
    for seed in (0, 1, 2):
        found["clip", 1e-4, seed]["choose"]["R@1"] = 0.0  # best on those compared on
    assert best_rate(found, "clip", "R@1") == 1e-3


def test_the_rows_and_the_page_have_all_comparisons_and_runs():
    rows = list(csv.DictReader(comparisons_csv(results()).splitlines()))
    assert len(rows) == 27 and {"difference", "interval", "rank", "baseline_rank"} <= set(rows[0])
    assert rows[0]["method"] == "paper-0.9" and float(rows[0]["difference"]) == -89
    runs = list(csv.DictReader(runs_csv(results()).splitlines()))
    assert len(runs) == 3 * (1 + 2 * len(METHODS)) and all(row["rank"] for row in runs)
    page = effect_page(results(), datetime(2026, 1, 1))
    for method in METHODS.values():
        assert f'">{method.label}</span>' in page
    assert "paper, τ = 0.9 is higher than CLIP: 11.0 ± 2.5." in page
    row = page.split('<th scope="row">paper, τ = 0.9 against CLIP</th>')[1].split("</tr>")[0]
    cells = ["11.0 ± 2.5 ↑ (0.001, 0.0001)", "−89.0 ± 2.5 ↓", "111.0 ± 2.5 ↑"]
    assert row == "".join(f"<td>{cell}</td>" for cell in cells)
    assert "5 seeds" not in page and "3 seeds" in page and "NaN" not in page
    assert page.count("<svg") >= len(MEASURES)
    assert "1 seed." in effect_page(results(seeds=(0,)), datetime(2026, 1, 1))


@pytest.mark.parametrize("method", METHODS)
def test_the_flags_are_those_of_himo_train(method):
    settings = TrainConfig(train_data="x", **METHODS[method].flags)
    base = METHODS[method].baseline
    if base is not None:
        without = TrainConfig(train_data="x", **METHODS[base].flags)
        assert without.lambda_comp == 0 and settings.lambda_comp is None
        assert without.preset == settings.preset


def test_clip_is_himo_with_a_component_loss_of_weight_0():
    grads, losses = [], []
    for flags in ({"loss": "clip"}, METHODS["clip"].flags):
        generator = torch.Generator().manual_seed(0)
        images, texts = (torch.randn(16, 8, generator=generator).requires_grad_() for _ in "it")
        objective = Objective(torch.nn.Linear(1, 1), TrainConfig(train_data="x", **flags))
        outputs = objective.losses(images, texts, torch.tensor(14.0))
        outputs["loss"].backward()
        losses.append(outputs["loss"])
        grads.append((images.grad, texts.grad))
    assert outputs["rank"] > 1
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_facts_and_words_are_those_of_the_scene():
    scene = Scene("cream", "navy blue", (Thing("star", "red", "large", 4),), frame="blue")
    facts = effect.facts_of(scene)
    assert {"wall cream", "floor navy blue", "frame blue", "4 kind star", "4 colour red"} <= {
        *facts
    }
    assert effect.words_of("A cat's head. Two!") == [
        *("a", "cat's", "head", "two"),
        *("a cat's", "cat's head", "head two"),
    ]
    found = data(SMALL)
    assert [len(part.facts) for part in (found.train, found.choose, found.compare)] == [200, 12, 12]
    held_out = list(draw_scenes(0, held_out=24))
    assert [len(of) for of in found.compare.words] == [len(one.sentences) for one in held_out[12:]]
    short, whole = (found.train.texts([0, 1], short=short) for short in (True, False))
    assert [text[: len(first)] for text, first in zip(whole, short, strict=True)] == short


@torch.no_grad()
def test_the_measures_are_those_of_texts_encoded_one_by_one():
    found = data(SMALL)
    torch.manual_seed(0)
    model = Towers(*found.names, SMALL)
    scenes = found.compare
    images = [F.normalize(model.images([facts]), dim=-1)[0] for facts in scenes.facts]
    correlations, whole = [], []
    for image, sentences in zip(images, scenes.words, strict=True):
        prefixes = [[*chain(*sentences[: end + 1])] for end in range(len(sentences))]
        texts = [F.normalize(model.texts([prefix]), dim=-1)[0] for prefix in prefixes]
        whole.append(texts[-1])
        if len(texts) > MORE_THAN:
            scores = [float(image @ text) for text in texts]
            correlations.append(np.corrcoef(scores, range(len(scores)))[0, 1])
    scores = torch.stack(images) @ torch.stack(whole).mT
    hits = [(scores.argmax(dim) == torch.arange(len(scores))).float().mean() for dim in (0, 1)]
    measured = measures(model, scenes)
    assert measured["HiMo@K"] == pytest.approx(np.mean(correlations), abs=1e-5)
    assert measured["R@1"] == pytest.approx(50 * float(sum(hits)))
    assert 0 <= measured["HiMo@3"] <= measured["HiMo@2"] <= 100


def test_a_run_goes_on_from_the_start_of_its_seed_and_is_the_same_again(tmp_path):
    start, *others = jobs_of(SMALL, tmp_path, [1e-3], [3])
    assert [job.method for job in others] == [*METHODS] and start.name == "start-3"
    assert run(start) == "start-3"
    for job in others:
        assert job.result() is None and run(job) == job.name
        found = job.result()
        assert len(found["ranks"]) >= 2 and 1 <= found["rank"] < SMALL.batch_size
        assert found["compare"].keys() == found["choose"].keys() > {*MEASURES}
    kept = others[1].result()
    os.remove(others[1].path)
    run(others[1])
    assert others[1].result() == kept
    by_method = [job.result()["compare"] for job in others]
    assert by_method[0] != by_method[1] and by_method[3] != by_method[4]


def test_a_result_of_another_setting_or_a_damaged_one_is_none(tmp_path):
    job = Job(SMALL, tmp_path, 0, "clip", 1e-3)
    same = {"described": job.described(), "rank": 3}
    job.path.write_text(json.dumps(same))
    assert job.result() == same
    changed = dataclasses.replace(job, setting=dataclasses.replace(SMALL, steps=7))
    assert changed.path == job.path and changed.result() is None
    for text in ("", '{"described": {', "[]", "3"):
        job.path.write_text(text)
        assert job.result() is None


@pytest.mark.slow
def test_what_is_done_is_not_run_again_and_a_lost_run_is(tmp_path, capsys):
    jobs = jobs_of(SMALL, tmp_path, [1e-3], [0, 1])
    run_all(jobs, 2)
    times = {job.name: job.path.stat().st_mtime_ns for job in jobs}
    assert len(times) == 2 + 2 * len(METHODS) and "12/12" in capsys.readouterr().err
    jobs[-1].path.write_text('{"described"')
    run_all(jobs, 2)
    again = {job.name: job.path.stat().st_mtime_ns for job in jobs}
    assert {name for name in times if times[name] != again[name]} == {jobs[-1].name}
    effect.write(jobs, tmp_path)
    assert {path.name for path in tmp_path.glob("effect*")} == {
        *("effect.csv", "effect_runs.csv", "effect.html")
    }


@pytest.mark.slow
def test_texts_of_a_trained_model_have_more_than_30_directions(tmp_path):
    setting = dataclasses.replace(Setting(), start_steps=500)
    run(Job(setting, tmp_path, 0))
    found = data(setting)
    model = Towers(*found.names, setting)
    model.load_state_dict(torch.load(tmp_path / "start-0.pt", weights_only=True))
    for first in (0, 128, 256):
        with torch.no_grad():
            texts = model.texts(found.compare.texts(range(first, first + 128)))
        texts = F.normalize(texts.double(), dim=-1)
        assert int(pca(texts, 0.9).rank) > 30 > 8
        # exp of the entropy of the shares of variance (Roy and Vetterli, 2007).
        values = np.linalg.svd(texts.numpy() - texts.numpy().mean(0), compute_uv=False) ** 2
        shares = values[values > 1e-12] / values.sum()
        assert np.exp(-(shares * np.log(shares)).sum()) > 30


def test_no_process_is_refused_and_nothing_is_written(tmp_path, capsys):
    with pytest.raises(SystemExit):
        effect.main(["--runs", str(tmp_path / "runs"), "--processes", "0"])
    assert "--processes: expected at least 1, got 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_with_what_is_left(tmp_path):
    folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    code = (
        "import sys; from benchmarks import effect; of = effect.jobs_of\n"
        f"small = effect.{SMALL}\n"
        "effect.jobs_of = lambda _, folder, rates, seeds: of(small, folder, rates[:4], seeds)\n"
        f"sys.exit(effect.main({[*folders, '--processes', '2']}))"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 200
        while process.poll() is None and not list(tmp_path.glob("runs/clip-*.json")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=240)
    assert process.returncode == 130 and "the same command goes on from" in said
    assert not list(tmp_path.glob("out/*")) and not list(tmp_path.glob("runs/*.tmp"))
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*.json")}
    assert len(SEEDS) < len(done) < len(SEEDS) * (1 + 4 * len(METHODS))
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())
    assert len(list(tmp_path.glob("runs/*.json"))) == len(SEEDS) * (1 + 4 * len(METHODS))
    assert len(list(tmp_path.glob("out/effect*"))) == 3


def test_the_grid_has_every_method_at_every_rate_and_seed(tmp_path):
    jobs = jobs_of(Setting(), tmp_path, RATES, SEEDS)
    assert len({job.name for job in jobs}) == len(jobs) == len(SEEDS) * (1 + 5 * len(RATES))
    assert len(SEEDS) >= 3 and [job.method for job in jobs[: len(SEEDS)]] == [""] * len(SEEDS)
