"""`himo ablate`: the paper's tables 4, 5 and 6 on any data, as runs and one page."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from himo import config, evaluate
from himo.ablate.grid import LAMBDAS, TAUS, tables
from himo.ablate.page import ablation_page, numbers_csv, read_results
from himo.ablate.runs import claim, job_of, run_all
from himo.config import TrainConfig
from himo.device import usable_device
from himo.errors import HimoError
from himo.evaluate.captions import data_options
from himo.evaluate.datasets import named
from himo.evaluate.suite import open_items
from himo.files import write_text
from himo.flags import as_arguments, flag
from himo.report.runs import plural

# What the grid sets, or decides where a run is written and whether it goes on.
_SET_HERE = (
    *("loss", "preset", "tau", "lambda_comp", "lambda_global", "decompose_images", "seed"),
    *("device", "logs", "name", "resume", "allow_changes", "patience", "report_to", "dry_run"),
    "fsdp",  # a run is one process
)
# Of `himo eval`, as the training data are read.
_READING = (
    *("dataset_type", "image_root", "csv_separator", "csv_img_key", "csv_caption_key"),
    "follow_links",
)
_Number = TypeVar("_Number", int, float)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `himo ablate`: its own, and the ones of `himo train` that all runs share."""
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the runs and page")
    parser.add_argument("--eval-data", help="data set to measure on (default: --val-data)")
    parser.add_argument("--himo-docci", metavar="FILE", help="also measure HiMo@K on HiMo-Docci")
    parser.add_argument("--tables", default="4,5,6", help="of the paper (default: %(default)s)")
    listed = ",".join(f"{tau:g}" for tau in TAUS)
    parser.add_argument("--taus", default=listed, help="of table 4 (default: %(default)s)")
    listed = ",".join(f"{weight:g}" for weight in LAMBDAS)
    parser.add_argument("--lambdas", default=listed, help="of table 6 (default: %(default)s)")
    parser.add_argument("--seeds", default="0", help="a run of each: 0,1,2 (default: %(default)s)")
    text = "one run at a time on each: cuda:0,cuda:1; auto takes every free GPU, or the CPU"
    parser.add_argument("--devices", default="auto", help=text)
    fields = [item.name for item in dataclasses.fields(TrainConfig)]
    config.add_arguments(parser, [name for name in fields if name not in _SET_HERE])


def run(args: argparse.Namespace) -> int:
    """Runs the rest of the grid and writes the page; returns 130 if a signal stopped it."""
    wanted = tables(
        _numbers("--tables", args.tables, int),
        _numbers("--taus", args.taus, float),
        _numbers("--lambdas", args.lambdas, float),
    )
    seeds = _numbers("--seeds", args.seeds, int)
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise HimoError(f"--seeds: expected different numbers of at least 0, got {args.seeds}")
    devices = _devices(args.devices)
    settings = config.from_arguments(args)
    train, measure = _train_flags(settings), _eval_flags(args, settings)
    out = Path(args.out)
    variants = {variant.name: variant for table in wanted for _, variant, _ in table.rows}
    jobs = {
        name: [job_of(out, variant, seed, train, measure) for seed in seeds]
        for name, variant in variants.items()
    }
    if not all(job.result.exists() for of in jobs.values() for job in of):
        _check_eval_data(measure)
    claim(out, {"train": train, "eval": measure})
    # The first seed of every variant before the second of any.
    if not run_all([of[k] for k in range(len(seeds)) for of in jobs.values()], devices):
        print(f"stopped; the same command goes on from {out}")
        return 130
    results = read_results({name: [job.folder for job in of] for name, of in jobs.items()})
    about = _about(settings, measure)
    write_text(out / "ablation.csv", numbers_csv(wanted, results))
    write_text(out / "ablation.html", ablation_page(wanted, results, about, datetime.now()))
    print(f"page: {(out / 'ablation.html').resolve()}, all numbers: ablation.csv")
    return 0


def _numbers(flag: str, given: str, kind: Callable[[str], _Number]) -> list[_Number]:
    try:
        return [kind(part) for part in given.split(",")]
    except ValueError as error:
        raise HimoError(f"{flag}: expected numbers with commas, got {given!r}") from error


def _devices(given: str) -> Sequence[str]:
    if given != "auto":
        names = [name.strip() for name in given.split(",")]
        for name in names:
            try:
                usable_device(name)
            except HimoError as error:
                raise HimoError(f"--devices: {error}") from error
        return names
    if not torch.cuda.is_available():
        return ["cpu"]
    free = []
    for number in range(torch.cuda.device_count()):
        left, total = torch.cuda.mem_get_info(number)
        if left > 0.9 * total:  # a process of someone else takes more than its context
            free.append(f"cuda:{number}")
    if not free:
        raise HimoError("--devices: no GPU is free; name those to use, or cpu")
    return free


def _train_flags(settings: TrainConfig) -> dict[str, Any]:
    """The fields that are given, without the fields of the grid."""
    given: dict[str, Any] = {}
    for item in dataclasses.fields(TrainConfig):
        value = getattr(settings, item.name)
        if value == item.default:
            continue
        if item.name in _SET_HERE:  # only a file of --config can name it
            expected = "expected none, himo ablate sets it"
            raise HimoError(f"{flag(item.name)}: {expected}, got {value}")
        given[item.name] = value
    return given


def _eval_flags(args: argparse.Namespace, settings: TrainConfig) -> list[str]:
    data = args.eval_data or settings.val_data
    if data is None:
        raise HimoError("expected a data set to measure on: --eval-data or --val-data")
    # A named set is read in its own way.
    names = () if named(data)[0] and not args.himo_docci else _READING
    values = {name: getattr(settings, name) or None for name in names}
    return as_arguments({"data": data, **values, "himo_docci": args.himo_docci or None})


def _check_eval_data(flags: Sequence[str]) -> None:
    """HimoError if `himo eval` cannot read its data: said before the first run is trained."""
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    args = parser.parse_args(["--pretrained", "", *flags])
    more = [("prefixes", args.himo_docci)] if args.himo_docci else []
    open_items(args.data, None, data_options(args), None, more)


def _about(settings: TrainConfig, measure: Sequence[str]) -> list[str]:
    start = f"from {settings.pretrained}" if settings.pretrained else "from random weights"
    extent = f" for {plural(settings.epochs, 'epoch')}" if settings.epochs else ""
    rate = f" at a learning rate of {settings.lr:g}" if settings.lr is not None else ""
    trained = f"Trained {start} on {settings.train_data}{extent}{rate}."
    return [trained, f"Measured on {measure[1]}."]
