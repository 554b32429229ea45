"""`make effect`: what the component loss changes, over learning rates and seeds.

    python -m benchmarks.effect --runs demo/effect --out benchmarks/results/cpu

Two small towers are trained from scratch on the first sentences of captions, and then fine-tuned
on whole captions, as the paper does, with each loss of METHODS at each of RATES. `himo synth` makes
the scenes. The image tower gets the facts of a scene, not its picture: a CLIP that reads pictures
keeps few directions in the minutes of a run here (`last_rank` of demo.csv), and HiDe needs many.
Loss, optimizer and schedule are the same as in `himo train`, the metrics as in `himo eval`.

A method is compared with the same loss without its component part, at each rate and at the best
rate of either, chosen on other scenes than those compared on. Runs are paired by seed.
"""

import argparse
import json
import math
import multiprocessing
import operator
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from itertools import accumulate, chain, pairwise
from pathlib import Path
from statistics import mean
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.effect_rows import METHODS, Results, comparisons_csv, effect_page, runs_csv
from himo.config import TrainConfig
from himo.evaluate.himo_k import himo_at, himo_k
from himo.evaluate.retrieval import retrieval
from himo.files import write_text
from himo.objective import Objective
from himo.optimizer import MAX_LOG_SCALE, clamp_temperature, learning_rate, make_optimizer
from himo.synth import draw_scenes
from himo.synth.scenes import Scene

RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3, 1.28e-2)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Setting:
    """What all runs share; a result of another setting is computed anew."""

    scenes: int = 6000
    held_out: int = 500  # of each: to choose a rate, and to compare
    width: int = 256
    embed_dim: int = 128
    batch_size: int = 128
    start_steps: int = 1000
    start_rate: float = 1e-3
    steps: int = 400
    warmup: int = 20
    wd: float = 0.01


@dataclass(frozen=True)
class Job:
    """A run: a method and a rate, or the start of a seed, where `method` is empty."""

    setting: Setting
    folder: Path
    seed: int
    method: str = ""
    lr: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.method}-{self.lr:g}-{self.seed}" if self.method else f"start-{self.seed}"

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.json"

    def described(self) -> dict[str, Any]:
        """What decides the result, as its file records it."""
        flags = METHODS[self.method].flags if self.method else {}
        return {"setting": vars(self.setting), "seed": self.seed, "flags": flags, "lr": self.lr}

    def result(self) -> dict[str, Any] | None:
        """The result of the same run, if there is one."""
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return None
        same = isinstance(found, dict) and found.get("described") == self.described()
        return found if same else None


class Tower(nn.Module):
    """The features of bags of names: a text's words, or a scene's facts."""

    def __init__(self, names: int, setting: Setting) -> None:
        super().__init__()
        width = setting.width
        self.bag = nn.EmbeddingBag(names, width, mode="sum")
        nn.init.normal_(self.bag.weight, std=0.05)
        self.head = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, setting.embed_dim),
        )

    def forward(self, bags: Sequence[list[int]]) -> Tensor:
        """Features [B, E] of B bags, each of indices of names."""
        ends = torch.tensor([0, *(len(bag) for bag in bags)]).cumsum(0)
        indices = torch.tensor([index for bag in bags for index in bag])
        return cast(Tensor, self.head(self.bag(indices, ends[:-1])))


class Towers(nn.Module):
    """Two towers and CLIP's temperature."""

    def __init__(self, facts: int, words: int, setting: Setting) -> None:
        super().__init__()
        self.images, self.texts = Tower(facts, setting), Tower(words, setting)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


@dataclass(frozen=True)
class Scenes:
    """Scenes as bags of facts, and the words of each sentence of their captions."""

    facts: list[list[int]]
    words: list[list[list[int]]]

    def texts(self, rows: Sequence[int], *, short: bool = False) -> list[list[int]]:
        """Whole captions, or their first sentences."""
        return [[*chain(*self.words[row][: 1 if short else None])] for row in rows]

    def part(self, start: int, stop: int) -> "Scenes":
        return Scenes(self.facts[start:stop], self.words[start:stop])


@dataclass(frozen=True)
class Data:
    """Training scenes, and those to choose a rate and to compare."""

    train: Scenes
    choose: Scenes
    compare: Scenes
    names: tuple[int, int]  # of facts, of words


@cache
def data(setting: Setting) -> Data:
    """The scenes of a setting. Names that are rare in the training scenes are left out."""
    drawn = list(draw_scenes(setting.scenes, 0, 2 * setting.held_out))
    facts = [facts_of(one.scene) for one in drawn]
    words = [[words_of(sentence) for sentence in one.sentences] for one in drawn]
    first = 2 * setting.held_out  # draw_scenes has those held out first
    known_facts = _known(facts[first:])
    known_words = _known([[*chain(*sentences)] for sentences in words[first:]])
    every = Scenes(
        [_indices(known_facts, of) for of in facts],
        [[_indices(known_words, of) for of in sentences] for sentences in words],
    )
    parts = (
        every.part(first, len(drawn)),
        every.part(0, first // 2),
        every.part(first // 2, first),
    )
    return Data(*parts, (len(known_facts), len(known_words)))


def facts_of(scene: Scene) -> list[str]:
    """What is where in a scene."""
    facts = [f"{name} {getattr(scene, name)}" for name in ("wall", "floor", "pattern")]
    facts += [f"{name} {getattr(scene, name)}" for name in ("frame", "rail")]
    for thing in scene.things:
        facts += [f"{thing.place} {name} {value}" for name, value in thing._asdict().items()]
    return facts


def words_of(text: str) -> list[str]:
    """The words of a text, and each two in a row."""
    words = re.findall(r"[a-z'-]+", text.lower())
    return [*words, *(f"{a} {b}" for a, b in pairwise(words))]


def _known(bags: Sequence[Sequence[str]], least: int = 20) -> dict[str, int]:
    counts = Counter(name for bag in bags for name in bag)
    return {name: i for i, name in enumerate(n for n, c in counts.items() if c >= least)}


def _indices(known: dict[str, int], names: Sequence[str]) -> list[int]:
    return [known[name] for name in names if name in known]


def run(job: Job) -> str:
    """Trains and measures, and writes the result; returns the job's name."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    found = data(job.setting)
    model = Towers(*found.names, job.setting)
    start = job.folder / f"start-{job.seed}.pt"
    if job.method:
        model.load_state_dict(torch.load(start, weights_only=True))
    ranks = _train(model, job, found.train)
    parts = {"choose": found.choose, "compare": found.compare}
    measured = {name: measures(model, scenes) for name, scenes in parts.items()}
    if not job.method:
        torch.save(model.state_dict(), start)
    result = {"described": job.described(), "rank": ranks[-1], "ranks": ranks, **measured}
    write_text(job.path, json.dumps(result) + "\n")
    return job.name


def _train(model: Towers, job: Job, scenes: Scenes) -> list[int]:
    """Trains a model; returns R at five steps, the last one among them."""
    setting, is_start = job.setting, not job.method
    flags = METHODS[job.method or "clip"].flags
    steps = setting.start_steps if is_start else setting.steps
    settings = TrainConfig(
        train_data="scenes",
        lr=setting.start_rate if is_start else job.lr,
        wd=setting.wd,
        warmup=setting.warmup,
        **flags,
    )
    if settings.preset == "official":
        nn.init.constant_(model.logit_scale, MAX_LOG_SCALE)
    as_clip = cast(Any, model)  # it has the attributes of HiMoCLIP that are used here
    objective, optimizer = Objective(as_clip, settings), make_optimizer(as_clip, settings)
    order = _order(len(scenes.facts), setting.batch_size, job.seed)
    ranks = []
    for step in range(steps):
        rows = next(order)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, settings)
        images = model.images([scenes.facts[row] for row in rows])
        texts = model.texts(scenes.texts(rows, short=is_start))
        outputs = objective.losses(images, texts, model.logit_scale.exp())
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
        if settings.preset == "paper":  # as himo train
            clamp_temperature(as_clip)
        if (step + 1) % max(1, steps // 5) == 0:
            ranks.append(int(outputs["rank"]))
    return ranks


def _order(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Batches of whole epochs, in the order of a seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


@torch.no_grad()
def measures(model: Towers, scenes: Scenes) -> dict[str, float]:
    """R@1 of both ways, HiMo@2, HiMo@3 and HiMo@K of whole captions."""
    images = F.normalize(model.images(scenes.facts), dim=-1)
    prefixes = [list(accumulate(of, operator.add)) for of in scenes.words]
    lengths = [len(of) for of in prefixes]
    texts = F.normalize(model.texts([prefix for of in prefixes for prefix in of]), dim=-1)
    own = torch.repeat_interleave(images, torch.tensor(lengths), dim=0)
    series = (texts * own).sum(1).split(lengths)
    whole = texts[torch.tensor(lengths).cumsum(0) - 1]
    found = retrieval(images, whole, range(len(images)))
    ways = [found[way]["R@1"] for way in ("image_to_text", "text_to_image")]
    values = {f"HiMo@{k}": himo_at(series, k)["value"] for k in (2, 3)}
    return {"R@1": mean(ways), **values, "HiMo@K": himo_k(series)["value"]}


def jobs_of(
    setting: Setting, folder: Path, rates: Sequence[float], seeds: Sequence[int]
) -> list[Job]:
    """The starts, and then the first seed of every method and rate before the second of any."""
    starts = [Job(setting, folder, seed) for seed in seeds]
    return starts + [
        replace(start, method=method, lr=lr)
        for start in starts
        for lr in rates
        for method in METHODS
    ]


def run_all(jobs: Sequence[Job], processes: int) -> None:
    """Runs what has no result yet, the starts first; each process has one thread."""
    left = [job for job in jobs if job.result() is None]
    if not left:
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads
    pool = ProcessPoolExecutor(processes, context, initializer=_ignore_interrupts)
    with tqdm(total=len(jobs), initial=len(jobs) - len(left), unit="run", smoothing=0) as bar:
        try:
            for starts in (True, False):
                part = [pool.submit(run, job) for job in left if (not job.method) is starts]
                for done in as_completed(part):
                    bar.set_postfix_str(done.result(), refresh=False)
                    bar.update()
        except BaseException:
            for process in multiprocessing.active_children():  # a result is written as a whole
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends this process


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the jobs that are left, and writes the rows and the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.effect", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("demo/effect"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu"))
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args(arguments)
    if given.processes < 1:
        parser.error(f"--processes: expected at least 1, got {given.processes}")
    for folder in (given.runs, given.out):
        folder.mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(Setting(), given.runs, RATES, SEEDS)
    try:
        run_all(jobs, given.processes)
    except (KeyboardInterrupt, BrokenProcessPool) as error:
        if isinstance(error, BrokenProcessPool):
            print("a process ended: was it killed for memory?", file=sys.stderr)
        print(f"stopped; the same command goes on from {given.runs}")
        return 130
    write(jobs, given.out)
    return 0


def write(jobs: Sequence[Job], out: Path) -> None:
    """Writes the rows of all runs, the rows of all comparisons, and the page."""
    results: Results = {(job.method, job.lr, job.seed): job.result() or {} for job in jobs}
    write_text(out / "effect_runs.csv", runs_csv(results))
    write_text(out / "effect.csv", comparisons_csv(results))
    write_text(out / "effect.html", effect_page(results, datetime.now()))
    print(f"page: {(out / 'effect.html').resolve()}, rows: effect.csv, effect_runs.csv")


if __name__ == "__main__":
    raise SystemExit(main())
