"""Time and memory of a training step by part, ours and the semantics of the released code.

    python -m benchmarks.train_step --data himo_docci.jsonl --out train_step.csv

"himo" packs the captions, computes the loss by HiMoLoss and steps with fused AdamW; "released"
runs the same towers on captions padded to the context, the eager loss of
`benchmarks.baselines.released`, and AdamW as torch chooses it on the device. With --compile,
"compiled" is "himo" on captions padded to the longest, with towers and loss compiled as one graph,
as by `himo train --compile`. All ways run in each round, and a time is the smallest of the rounds.
The weights are random: they do not change the time. Writes a row for each part; the rows replace
earlier rows of the same measurement.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.baselines import released
from benchmarks.rows import Row, facts, number, replace_rows
from benchmarks.run import positive
from himo.config import TrainConfig
from himo.evaluate import read_himo_docci
from himo.model import CONFIGS, HiMoCLIP, named_config, text_lengths
from himo.optimizer import make_optimizer
from himo.tokenizer import tokenize
from himo_kernels.nn import HiMoLoss

TOLERANCE = 1e-4  # between the losses of both ways, relative; otherwise there is no row
TAU = 0.9
WAYS = ("himo", "released")
COLUMNS = (
    "model",
    "batch_size",
    "way",  # himo, released or compiled
    # text tower, image tower, head, or all of them as forward; backward, optimiser; the whole step
    "part",
    "time_s",  # smallest of the rounds
    "released_over_himo",  # of those times, in the rows of himo
    "peak_mib",  # of tensors during the part, from the start of the step on
    "tokens",  # that the text tower computes
    "loss",
    "rounds",
    "load",
    "device",
    "torch",
    "threads",
    "commit",
    "date",
)
CELL = ("model", "batch_size", "way", "part", "device", "threads")  # one row each
Part = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="HiMo-Docci's file; its longest captions")
    parser.add_argument("--out", required=True, type=Path, help="csv file of the rows")
    parser.add_argument("--model", default="ViT-B-16", choices=CONFIGS, help="(%(default)s)")
    parser.add_argument("--batch-size", type=positive, default=32, help="pairs (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=5, help="(%(default)s)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    replace_rows(args.out, measure(args), COLUMNS, CELL)


def measure(args: argparse.Namespace) -> list[Row]:
    """Prints the ratios of one measurement and returns its rows."""
    load = os.getloadavg()[0]
    records, _ = read_himo_docci(args.data)
    captions = [record.prefixes[-1] for record in records]
    captions = captions[:: max(1, len(captions) // args.batch_size)][: args.batch_size]
    if len(captions) < args.batch_size:
        raise SystemExit(f"--batch-size: expected at most the {len(captions)} captions of --data")
    torch.manual_seed(0)
    config = named_config(args.model)
    images = torch.randn(len(captions), 3, config.image_resolution, config.image_resolution)
    tokens = tokenize(captions, context_length=config.context_length)
    weights = HiMoCLIP(config).state_dict()
    ways = (*WAYS, "compiled") if args.compile else WAYS
    steps = {way: _Step(way, weights, args.model, images, tokens) for way in ways}
    for step in steps.values():
        step.run(_timed)  # the state of the optimizer is made here
    times: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    losses: dict[str, float] = {}
    for _ in range(args.rounds):
        for way, step in steps.items():
            times[way].append(step.run(_timed))
            losses[way] = step.loss
    error = max(abs(loss / losses["released"] - 1) for loss in losses.values())
    if not error <= TOLERANCE:
        raise SystemExit(f"losses differ by {error:.3g} of their size, more than {TOLERANCE:g}")
    best = {
        way: {part: min(taken[part] for taken in rounds) for part in rounds[0]}
        for way, rounds in times.items()
    }
    ratios = {part: best["released"][part] / seconds for part, seconds in best["himo"].items()}
    print(", ".join(f"{part} {ratio:.2f}" for part, ratio in ratios.items()), "times as fast")
    if args.compile:
        ratio = best["himo"]["step"] / best["compiled"]["step"]
        print(f"a compiled step {ratio:.2f} times as fast as one that is not")
    known = facts("cpu", args.threads) | {"rounds": str(args.rounds), "load": f"{load:.1f}"}
    known |= {"model": args.model, "batch_size": str(args.batch_size)}
    rows = []
    for way, step in steps.items():
        peaks = step.run(_profiled)
        peaks["step"] = max(peaks.values())
        for part, seconds in best[way].items():
            row = known | {
                "way": way,
                "part": part,
                "time_s": number(seconds),
                "released_over_himo": number(ratios[part] if way == "himo" else None),
                "peak_mib": number(peaks[part] / 2**20),
                "tokens": str(step.tokens_computed),
                "loss": f"{losses[way]:.6g}",
            }
            rows.append({name: row[name] for name in COLUMNS})
    return rows


class _Step:
    """A training step of a model with its own weights, part by part."""

    def __init__(
        self, way: str, weights: Mapping[str, Tensor], model: str, images: Tensor, tokens: Tensor
    ) -> None:
        self.way = way
        self.model = HiMoCLIP(named_config(model))
        self.model.load_state_dict(weights)
        self.images, self.tokens = images, tokens
        self.lengths = text_lengths(tokens)
        settings = TrainConfig(train_data="none", lr=1e-6, wd=0.01)
        self.optimizer: torch.optim.Optimizer = make_optimizer(self.model, settings)
        if way == "released":
            groups = [{**g, "fused": None} for g in self.optimizer.param_groups]
            self.optimizer = torch.optim.AdamW(groups, lr=settings.lr)
        self.tokens_computed = 0
        if way != "compiled":
            self.model.transformer.register_forward_pre_hook(self._count)
        self.head = HiMoLoss("official", variance_threshold=TAU)
        if way == "compiled":
            self._outputs = torch.compile(self._outputs, fullgraph=True)  # type: ignore[method-assign]

    @property
    def loss(self) -> float:
        return float(self._loss)

    def run(self, measured: Callable[[Mapping[str, Part]], dict[str, float]]) -> dict[str, float]:
        """Takes a step; what `measured` finds in each part, by name."""
        forward: dict[str, Part] = {"forward": self._forward}
        if self.way != "compiled":
            forward = {
                "text tower": self._text,
                "image tower": self._image,
                "head": self._losses,
            }
        return measured(forward | {"backward": self._backward, "optimiser": self._update})

    def _forward(self) -> None:
        tokens = self.tokens[:, : max(self.lengths)]
        self.tokens_computed = tokens.numel()
        self.pictures, self.texts, self._loss = self._outputs(self.images, tokens)

    def _outputs(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        pictures, texts = self.model.encode_image(images), self.model.encode_text(tokens)
        return pictures, texts, self.head(pictures, texts, self.model.logit_scale.exp())

    def _text(self) -> None:
        packs = self.way == "himo"
        given = {"lengths": self.lengths} if packs else {"max_length": self.tokens.shape[1]}
        self.texts = self.model.encode_text(self.tokens, **given)

    def _image(self) -> None:
        self.pictures = self.model.encode_image(self.images)

    def _losses(self) -> None:
        features = self.pictures, self.texts, self.model.logit_scale.exp()
        if self.way == "himo":
            self._loss = self.head(*features)
        else:
            self._loss = sum(released.himo_loss(*features, ratio=TAU), torch.zeros(()))

    def _backward(self) -> None:
        self._loss.backward()
        self._loss = self._loss.detach()
        del self.texts, self.pictures

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _count(self, _: object, args: tuple[Tensor, ...]) -> None:
        self.tokens_computed = args[0].shape[:-1].numel()


def _timed(parts: Mapping[str, Part]) -> dict[str, float]:
    """The seconds of each part, and of the step."""
    found = {}
    for name, part in parts.items():
        begun = time.perf_counter()
        part()
        found[name] = time.perf_counter() - begun
    return found | {"step": sum(found.values())}


def _profiled(parts: Mapping[str, Part]) -> dict[str, float]:
    """The most bytes in use in each part beyond those at the start of the step."""
    # One profile of all parts: it does not see the end of memory that was taken before it began.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for name, part in parts.items():
            with record_function(name):
                part()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    found: dict[str, float] = {}
    alive, name = 0, ""
    for event in events:
        if event.name() in parts:
            name = event.name()
        elif event.name() == "[memory]":
            alive += event.nbytes()
        found[name] = max(found.get(name, alive), alive)
    return {name: found[name] for name in parts}


if __name__ == "__main__":
    main()
