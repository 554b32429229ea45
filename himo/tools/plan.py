"""`himo plan`: whether a training step fits a GPU's memory, and which flag would make it fit."""

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from himo import config, recipes
from himo.config import TrainConfig
from himo.errors import HimoError
from himo.flags import as_arguments
from himo.tools.footprint import (
    BACKWARD,
    EXCHANGE,
    IMAGE,
    KINDS,
    LOSS,
    SAVING,
    TEXT,
    UPDATE,
    Memory,
    Rehearsal,
)

# The flags of `himo train` that change the memory of a step.
_FLAGS = (
    *("model", "pretrained", "lock_image", "lock_image_unlocked_groups"),
    *("lock_text", "lock_text_unlocked_layers", "grad_checkpointing", "loss", "preset"),
    *("batch_size", "accum_freq", "ema", "exchange", "fsdp", "precision"),
)
_LEAST_BATCH = 2  # of the trainer
# Pairs of all processes in a step, and processes: counting these takes a minute.
_MAX_PAIRS, _MAX_RANKS = 1 << 20, 4096
_GIB = 1 << 30
_MAX_GIB = 100_000  # the widest number of the table
_WIDTH = 79  # columns
_BAR = 40  # characters for the memory given, or the total where that is more
_PHASES = {
    IMAGE: "in the forward pass of the image tower",
    TEXT: "in the forward pass of the text tower",
    LOSS: "in the loss",
    EXCHANGE: "in the loss",
    BACKWARD: "in the backward pass",
    UPDATE: "in the step of the optimizer",
    SAVING: "while process 0 saves the model",
}
NOT_COUNTED = (
    "the CUDA context",
    "workspaces of cuBLAS, cuDNN, cuSOLVER and NCCL",
    "memory that the allocator holds and no tensor uses",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `himo train` that matter, --gpu-mem, --ranks and --json."""
    parser.add_argument(
        "--gpu-mem", type=float, required=True, metavar="GIB", help="free memory of one GPU, in GiB"
    )
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="processes of the run (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    config.add_arguments(parser, _FLAGS)


def run(args: argparse.Namespace) -> int:
    """Prints the plan; returns 0 if the step fits and 1 if it does not."""
    settings = config.from_arguments(args, train_data="(none is read)", recipe="paper-b16")
    settings = recipes.with_schedule(recipes.with_model(settings, None), None)
    if settings.precision == "auto":  # as a GPU chooses
        settings = dataclasses.replace(settings, precision="amp_bf16")
    if not 0 < args.gpu_mem <= _MAX_GIB:
        raise HimoError(f"--gpu-mem: expected GiB above 0 and up to {_MAX_GIB}, got {args.gpu_mem}")
    if not 1 <= args.ranks <= _MAX_RANKS:
        raise HimoError(f"--ranks: expected 1 to {_MAX_RANKS}, got {args.ranks}")
    if settings.fsdp and args.ranks == 1:
        raise HimoError("--fsdp: expected --ranks 2 or more beside it, got 1")
    pairs = settings.batch_size * settings.accum_freq * args.ranks
    if pairs > _MAX_PAIRS:
        raise HimoError(
            f"--batch-size: expected at most {_MAX_PAIRS} pairs in a step of all processes "
            f"(batch size x accum freq x ranks), got {pairs}"
        )
    plan = make_plan(settings, args.ranks, int(args.gpu_mem * _GIB))
    print(json.dumps(as_json(plan), indent=1) if args.json else table(plan))
    return 0 if plan.fits else 1


@dataclasses.dataclass(frozen=True)
class Alternative:
    """Flags to change, the memory of a step with them, and whether it fits."""

    changes: dict[str, Any]
    memory: Memory
    fits: bool

    @property
    def flags(self) -> str:
        return " ".join(as_arguments(self.changes))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The bytes that one process needs; where they are too many, flags that need fewer."""

    settings: TrainConfig
    ranks: int
    limit: int
    memory: Memory
    largest_batch: int  # pairs of one process, 0 where not even the trainer's least fit
    alternatives: list[Alternative]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.limit


def make_plan(settings: TrainConfig, ranks: int, limit: int) -> Plan:
    """The plan of a run of `ranks` processes, each with `limit` bytes."""
    # Without a delay: the first step takes seconds, and a delayed bar is drawn only after it.
    with tqdm(desc="counting", unit="step", disable=None, leave=False) as bar:
        rehearsal = Rehearsal(settings, ranks)

        def step(**changes: Any) -> Memory:
            memory = rehearsal.step(**changes)
            bar.update()
            return memory

        memory = step()
        fixed = rehearsal.fixed
        most = _most_counted(settings, ranks)

        def total(batch: int) -> int:
            return step(batch_size=batch).total

        found = largest_batch(total, (settings.batch_size, memory.total), fixed, limit, most)
        plan = Plan(settings, ranks, limit, memory, found, [])
        if not plan.fits:
            plan.alternatives.extend(_alternatives(plan, step, fixed))
    return plan


def _most_counted(settings: TrainConfig, ranks: int) -> int:
    return _MAX_PAIRS // (ranks * settings.accum_freq)


def largest_batch(
    total: Callable[[int], int], start: tuple[int, int], fixed: int, limit: int, most: int
) -> int:
    """The largest batch up to `most` whose total is within the limit; 0 if the least is not.

    Args:
        total: bytes of a batch; grows with it, nearly in proportion.
        start: a batch and its total.
        fixed: bytes of no batch, or about as many.
    """
    fits, fails = _LEAST_BATCH - 1, most + 1
    before, (batch, size) = (0, fixed), start
    for tried in range(1, 200):
        fits, fails = (max(fits, batch), fails) if size <= limit else (fits, min(fails, batch))
        if fails - fits <= 1:
            break
        # Where the line through the last two meets the limit; every fourth time the middle, in case
        # of a curve.
        rise = size - before[1]
        run = (limit - size) * (batch - before[0]) // rise if rise else 8 * batch
        guess = min(batch + run, 8 * batch) if tried % 4 else (fits + min(fails, 64 * fits)) // 2
        before = (batch, size)
        batch = min(max(guess, fits + 1), fails - 1)
        size = total(batch)
    return fits if fits >= _LEAST_BATCH else 0


def _alternatives(plan: Plan, step: Callable[..., Memory], fixed: int) -> list[Alternative]:
    # One flag at a time; all of them, and smaller batches, where no single one is enough.
    settings, limit = plan.settings, plan.limit

    def tried(changes: dict[str, Any]) -> Alternative:
        memory = step(**changes)
        return Alternative(changes, memory, memory.total <= limit)

    def accumulated(near: int, changes: dict[str, Any]) -> list[Alternative]:
        # The same pairs contrasted together, in smaller batches. The other batches' gradients and
        # embeddings take memory too, so one or two sizes below `near` may be needed.
        pairs = settings.batch_size * settings.accum_freq
        smaller = [n for n in range(min(near, settings.batch_size - 1), 1, -1) if pairs % n == 0]
        for batch in smaller[:3]:
            other = tried(changes | {"batch_size": batch, "accum_freq": pairs // batch})
            if other.fits:
                return [other]
        return []

    together: dict[str, Any] = {}
    if not settings.grad_checkpointing:
        together["grad_checkpointing"] = True
    if settings.precision == "fp32":
        together["precision"] = "amp_bf16"
    if plan.ranks > 1 and settings.exchange == "gather":
        together["exchange"] = "ring"
    if plan.ranks > 1 and not settings.fsdp:
        together["fsdp"] = True
    others = [tried({name: value}) for name, value in together.items()]
    others += accumulated(plan.largest_batch, {})
    if not together or any(other.fits for other in others):
        return others
    both = tried(together)
    if both.fits:
        return [*others, both]
    # In proportion: close enough for a size that divides the batch.
    near = settings.batch_size * max(0, limit - fixed) // max(1, both.memory.total - fixed)
    return others + accumulated(near, together)


def table(plan: Plan) -> str:
    """The plan for a terminal, at most 80 columns wide."""
    settings, memory = plan.settings, plan.memory
    ways = settings.exchange + (", FSDP" if settings.fsdp else "")
    of_many = f" in each of {plan.ranks} processes ({ways})" if plan.ranks > 1 else ""
    accumulated = f" x {settings.accum_freq} accumulated" if settings.accum_freq > 1 else ""
    mark_bytes = max(memory.total, plan.limit) / _BAR
    rows = [(kind, memory.parts[kind], "#") for kind in KINDS if memory.parts.get(kind)]
    rows += [("total", memory.total, "#"), ("given", plan.limit, "=")]
    lines = [
        f"{settings.pretrained or settings.model}, {settings.loss} loss, {settings.precision}"
        + (", recomputed activations" if settings.grad_checkpointing else ""),
        f"{settings.batch_size} pairs{accumulated}{of_many}",
        "",
        f"GiB of one process at its peak, {_PHASES.get(memory.phase, memory.phase)}",
    ]
    for name, size, mark in rows:
        bar = mark * round(size / mark_bytes)
        lines.append(f"  {name:<23}{_gib(size):>9}  {bar}".rstrip())
    verdict, which = ("fits", "left") if plan.fits else ("does not fit", "too much")
    lines += ["", f"{verdict}: {_gib(abs(plan.limit - memory.total))} GiB {which}"]
    if plan.largest_batch:
        lines.append(f"largest --batch-size that fits: {plan.largest_batch} pairs a process")
        if plan.largest_batch == _most_counted(settings, plan.ranks):
            lines[-1] += ", larger ones are not counted"
    else:
        lines.append(f"no --batch-size fits: not even {_LEAST_BATCH} pairs a process")
    if plan.alternatives:
        lines += ["", "instead, all else as it is (GiB)"]
        for other in plan.alternatives:
            word = "fits" if other.fits else "too much"
            lines.append(f"  {_gib(other.memory.total):>9} {word:<9} {other.flags}")
    if not plan.fits and not any(other.fits for other in plan.alternatives):
        lines.append("no flag is enough; a smaller model, --lock-image or --lock-text take less")
    said = (
        "Counted from the shapes of a step whose captions fill the context; no GPU was asked. "
        f"Not counted: {'; '.join(NOT_COUNTED)}."
    )
    return "\n".join([*lines, "", textwrap.fill(said, _WIDTH)])


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON; sizes in bytes."""
    return {
        "settings": {name: getattr(plan.settings, name) for name in _FLAGS},
        "ranks": plan.ranks,
        "gpu_mem": plan.limit,
        "fits": plan.fits,
        "total": plan.memory.total,
        "peak": _PHASES.get(plan.memory.phase, plan.memory.phase),
        "parts": {kind: plan.memory.parts.get(kind, 0) for kind in KINDS},
        "largest_batch_size": plan.largest_batch,
        "alternatives": [
            {"flags": other.flags, "total": other.memory.total, "fits": other.fits}
            for other in plan.alternatives
        ],
        "not_counted": list(NOT_COUNTED),
    }


def _gib(size: int) -> str:
    return f"{size / _GIB:,.2f}"
