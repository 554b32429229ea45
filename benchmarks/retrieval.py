"""Time and memory of retrieval both ways, as `himo eval` computes it: ranks, recalls and ties.

    python -m benchmarks.retrieval --out benchmarks/results/cpu/retrieval.csv

By default the size is COCO's, 5,000 images with 5 captions each, and the width is ViT-L/14's.
Features are random: a caption is its image and noise. Each run has its own process. Prints the
shortest time and the largest memory, and writes a row, which replaces an earlier row of the same
measurement.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.memory import in_child, peak_cpu
from benchmarks.rows import facts, number, replace_rows
from himo.evaluate import retrieval

COLUMNS = (
    "images",
    "captions",
    "features",
    "time_s_min",
    "time_s_p50",
    "cpu_s_min",  # of all threads: what the time would be on one idle core
    "peak_mib",  # beyond the features
    "resident_mib",  # of the process, with Python, torch and the features
    "r1_image_to_text",
    "r1_text_to_image",
    "runs",
    "load",
    "device",
    "torch",
    "threads",
    "commit",
    "date",
)
CELL = ("images", "captions", "features", "device", "threads")  # one row each
_NOISE = 7.5  # so that some captions find their image and others do not


def main(arguments: list[str] | None = None) -> None:
    """Prints what was measured and writes its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="csv file of the rows")
    parser.add_argument("--images", type=int, default=5000, help="(%(default)s)")
    parser.add_argument("--captions-per-image", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--features", type=int, default=768, help="(%(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    replace_rows(options.out, [measure(options)], COLUMNS, CELL)


def measure(options: argparse.Namespace) -> dict[str, str]:
    """The row of one measurement."""
    load = os.getloadavg()[0]
    runs = []
    for _ in range(options.runs):
        found = in_child(lambda: _run(options))
        if "time_ms" not in found:
            raise SystemExit(f"benchmarks.retrieval: {found['reason']}")
        runs.append(found)
    seconds = [run["time_ms"] / 1000 for run in runs]
    of_cpu = min(run["cpu_s"] for run in runs)
    peak, resident = (max(run[name] for run in runs) for name in ("peak_mib", "resident_mib"))
    count = options.images * options.captions_per_image
    print(
        f"{options.images:,} x {count:,} x {options.features}, {options.threads} threads: "
        f"{min(seconds):.2f} s, {of_cpu:.2f} s of CPU, {peak:.0f} MiB beyond the features, "
        f"{resident:.0f} MiB in all"
    )
    return (
        {"images": str(options.images), "captions": str(count), "features": str(options.features)}
        | {"time_s_min": number(min(seconds)), "time_s_p50": number(statistics.median(seconds))}
        | {"cpu_s_min": number(of_cpu)}
        | {"peak_mib": number(peak), "resident_mib": number(resident)}
        | {name: number(runs[0][name]) for name in ("r1_image_to_text", "r1_text_to_image")}
        | {"runs": str(options.runs), "load": f"{load:.1f}"}
        | {name: value for name, value in facts("cpu", options.threads).items() if name in COLUMNS}
    )


def _run(options: argparse.Namespace) -> dict[str, float]:
    """One run in this process."""
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.images, options.features, generator=generator)
    texts = images.repeat_interleave(options.captions_per_image, dim=0)
    texts += _NOISE * torch.randn(texts.shape, generator=generator)
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    owners = [image for image in range(len(images)) for _ in range(options.captions_per_image)]
    found: dict[str, Any] = {}

    def run() -> None:
        start = time.process_time()
        found["result"] = retrieval(images, texts, owners)
        found["cpu_s"] = time.process_time() - start

    measured = peak_cpu(lambda: retrieval(images[:8], texts[:8], list(range(8))), run)
    resident = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    shares = {
        f"r1_{way}": found["result"][way]["R@1"] for way in ("image_to_text", "text_to_image")
    }
    return measured | {"resident_mib": int(resident) / 1024, "cpu_s": found["cpu_s"]} | shares


if __name__ == "__main__":
    main()
