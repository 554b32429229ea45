"""Time and memory of reading training data: photos as files and packed, and a large index.

    python -m benchmarks.data --records 1250000 --out benchmarks/results/cpu/data.csv

`loader` rows: `himo bench data` on photos of 640 x 427 as COCO has them, with captions of some 130
words, in rounds: tokenised or from the token cache, as files or packed by `himo pack`, handed over
as uint8 or, as the released code does, as float32. The time is the smallest of the rounds, because
other programs only add to it.

`index` rows: a ShareGPT4V file of this many records is made, indexed and its captions encoded; then
several processes at once read records and tokens at random. The growth of memory counts private
pages only, because the system shares the pages of files. Processor seconds exclude the time in
which other programs ran.
"""

import argparse
import functools
import json
import multiprocessing
import os
import random
import re
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.rows import Row, facts, number, replace_rows
from himo.config import TrainConfig
from himo.data import CaptionedImages, EpochSampler, open_dataset, open_tokens
from himo.data.packing import PackOptions, pack
from himo.model import named_config
from himo.tools import bench
from himo.training_data import training_pairs

COLUMNS = (
    *("part", "variant", "workers", "count", "measure", "value", "unit"),
    *("rounds", "load", "device", "torch", "threads", "commit", "date"),
)
CELL = ("part", "variant", "workers", "measure", "device")  # one row each
WORDS = (
    "a the of and in on with red green blue wooden small large bright dark old house tree street "
    "window table lamp person dog river mountain stands beside behind shows holds near under"
)
_PHOTO = (640, 427)
_CAPTION_WORDS = 130
_READS = 20_000  # records that each reader takes
_BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="csv file of the rows")
    parser.add_argument("--photos", type=int, default=256, help="0: no such rows (%(default)s)")
    parser.add_argument("--records", type=int, default=0, help="of the index; 0: no such rows")
    parser.add_argument("--rounds", type=int, default=5, help="of the loader (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if args.photos:
            rows += loader_rows(Path(folder), args)
        if args.records:
            rows += index_rows(Path(folder), args)
    known = {name: value for name, value in facts("cpu", args.threads).items() if name in COLUMNS}
    known["load"] = f"{os.getloadavg()[0]:.1f}"
    for row in rows:
        print(", ".join(row[name] for name in ("part", "variant", "measure", "value", "unit")))
    replace_rows(args.out, [row | known for row in rows], COLUMNS, CELL)


def loader_rows(folder: Path, args: argparse.Namespace) -> list[Row]:
    """The steps of reading a pair in one process, and the loader of a ViT-B/16."""
    files, packed = write_photos(folder / "photos", args.photos), folder / "packed"
    pack(open_dataset(files), packed, PackOptions(), workers=args.workers, progress=False)
    given = {"model": "ViT-B-16", "batch_size": min(_BATCH, args.photos), "workers": args.workers}

    def data_set(path: Path, cache: bool, kind: type[CaptionedImages]) -> Any:
        settings = TrainConfig(str(path), token_cache=cache, **given)
        data = training_pairs(settings, open_dataset(path), named_config("ViT-B-16"))
        data.__class__ = kind
        return settings, data

    variants = {
        "files, float32": data_set(files, False, _AsFloat),
        "files": data_set(files, False, CaptionedImages),
        "files, token cache": data_set(files, True, CaptionedImages),
        "packed": data_set(packed, False, CaptionedImages),
        "packed, token cache": data_set(packed, True, CaptionedImages),
    }
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        for variant, (settings, data) in variants.items():
            sampler = EpochSampler(len(data), settings.batch_size)
            steps = bench.by_step(data, sampler.order().tolist(), args.seconds)
            whole, _ = bench.loader(settings, data, sampler, args.seconds)
            for rate in (*steps, whole):
                each_ms = 1e3 * rate.seconds / rate.samples
                times.setdefault((variant, rate.step), []).append(each_ms)
    rows = []
    for (variant, step), values in times.items():
        workers = args.workers if step == "loader" else 0
        rows.append(_row("loader", variant, workers, args.photos, step, min(values), "ms a pair"))
        rows[-1]["rounds"] = str(args.rounds)
    for variant, (_, data) in variants.items():
        size = sum(part.nbytes for part in data[0] if isinstance(part, Tensor)) / 1024
        rows.append(_row("loader", variant, 0, args.photos, "handed over", size, "KiB a pair"))
    return rows


class _AsFloat(CaptionedImages):
    """Normalises in the worker, as the released code does."""

    def image(self, index: int) -> Tensor:
        return self.preprocess.normalize(super().image(index))


def index_rows(folder: Path, args: argparse.Namespace) -> list[Row]:
    """Building and opening the index and token cache of a large file, and the memory of readers."""
    path, count = folder / "records.json", args.records
    write_records(path, count)
    rows = [_row("index", "annotations", 0, count, "size", path.stat().st_size / 2**20, "MiB")]

    def one(variant: str, workers: int, measure: str, value: float, unit: str) -> None:
        rows.append(_row("index", variant, workers, count, measure, value, unit))

    for variant, build, workers in (
        ("index", _build_index, 0),
        ("token cache", functools.partial(_build_tokens, workers=args.workers), args.workers),
    ):
        (built,) = _in_processes(build, [path])
        one(variant, workers, "build", built["seconds"], "s")
        one(variant, workers, "build, on processors", built["cpu_s"], "s")
        one(variant, workers, "peak memory of its process", built["peak_mib"], "MiB")
        (file,) = folder.glob(f"records.json.*.himo-{variant.split()[0].rstrip('s')}*")
        one(variant, workers, "size", file.stat().st_size / 2**20, "MiB")
    (alone,) = _in_processes(_read, [path])
    one("both", 1, "open", alone["open_s"], "s")
    one("both", 1, "read", 1e6 * alone["seconds"] / _READS, "us a record")
    one("both", 1, "growth of private memory", alone["growth_mib"], "MiB a process")
    if args.workers > 1:
        several = _in_processes(_read, [path] * args.workers)
        most = max(process["growth_mib"] for process in several)
        one("both", args.workers, "growth of private memory", most, "MiB a process")
    return rows


def _in_processes(call: Callable[[Path], Any], arguments: list[Path]) -> list[dict[str, float]]:
    """The results of a call for each argument, all at once in new processes."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(len(arguments), maxtasksperchild=1) as pool:
        return pool.map(call, arguments, chunksize=1)


def _build_index(path: Path) -> dict[str, float]:
    return _built(lambda: open_dataset(path, progress=False))


def _build_tokens(path: Path, workers: int) -> dict[str, float]:
    index = open_dataset(path, progress=False)
    # A pool's process is a daemon and could not have workers.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    return _built(lambda: open_tokens(index, 248, workers=workers, progress=False))


def _built(build: Callable[[], object]) -> dict[str, float]:
    began, cpu = time.perf_counter(), _cpu_s()
    build()
    seconds, cpu = time.perf_counter() - began, _cpu_s() - cpu
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "cpu_s": cpu, "peak_mib": peak_mib}


def _cpu_s() -> float:
    """Seconds of processors that this process and its ended workers have taken."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def _read(path: Path) -> dict[str, float]:
    """Opens index and cache and reads rows at random."""
    numbers = random.Random(os.getpid())
    before = _private_mib()
    began = time.perf_counter()
    index = open_dataset(path, progress=False)
    cache = open_tokens(index, 248, progress=False)
    opened = time.perf_counter() - began
    assert cache is not None
    began = time.process_time()
    for _ in range(_READS):
        row = numbers.randrange(len(index))
        index[row]
        cache.tokens(row)
    seconds = time.process_time() - began
    return {"open_s": opened, "seconds": seconds, "growth_mib": _private_mib() - before}


def _private_mib() -> float:
    text = Path("/proc/self/smaps_rollup").read_text()
    found = re.findall(r"^Private_(?:Clean|Dirty):\s+(\d+) kB$", text, re.MULTILINE)
    return sum(map(int, found)) / 1024


def write_photos(folder: Path, count: int) -> Path:
    """Photos of noise over a gradient, and captions."""
    folder.mkdir()
    numbers = np.random.default_rng(0)
    width, height = _PHOTO
    slope = np.linspace(0, 160, width)[None, :, None] + np.zeros((height, 1, 3))
    with (folder / "pairs.jsonl").open("w") as file:
        for number_ in range(count):
            noise = numbers.normal(0, 40, (height // 8 + 1, width // 8, 3)).repeat(8, 0)
            noise = noise.repeat(8, 1)[:height] + numbers.normal(0, 8, slope.shape)
            pixels = (slope + 48 + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number_}.jpg", quality=90)
            record = {"image": f"{number_}.jpg", "caption": caption(number_)}
            file.write(json.dumps(record) + "\n")
    return folder / "pairs.jsonl"


def caption(seed: int) -> str:
    """Sentences of ten words."""
    words = random.Random(seed).choices(WORDS.split(), k=_CAPTION_WORDS)
    sentences = (" ".join(words[start : start + 10]) for start in range(0, _CAPTION_WORDS, 10))
    return " ".join(f"{sentence.capitalize()}." for sentence in sentences)


def write_records(path: Path, count: int) -> None:
    """A ShareGPT4V file, with 1,000 image files in the same folder."""
    images = path.with_name("images")
    images.mkdir()
    for number_ in range(1000):
        (images / f"{number_:012}.jpg").write_bytes(b"")
    texts = [caption(seed) for seed in range(5000)]
    question = {"from": "human", "value": "What is in the picture?\n<image>"}
    with path.open("w") as file:
        for number_ in range(count):
            text = f"{texts[number_ % len(texts)]} Number {number_}."
            answer = {"from": "gpt", "value": text}
            record = {"id": f"{number_:012}", "image": f"images/{number_ % 1000:012}.jpg"}
            line = json.dumps(record | {"conversations": [question, answer]})
            file.write(f"{',' if number_ else '['}{line}\n")
        file.write("]\n")


def _row(
    part: str, variant: str, workers: int, count: int, measure: str, value: float, unit: str
) -> Row:
    given = {"part": part, "variant": variant, "measure": measure, "unit": unit, "rounds": "1"}
    return given | {"workers": str(workers), "count": str(count), "value": number(value)}


if __name__ == "__main__":
    main()
