"""Time of the text tower on captions with all their prefixes, as HiMo@K needs them.

    python -m benchmarks.prefixes --data himo_docci.jsonl --out benchmarks/results/cpu/prefixes.csv

Three ways, in rounds on the same texts: each text padded to the context, as the released code does;
each distinct text to the longest of its batch, sorted by length; and shared prefixes once, as
`himo eval` does. The weights are random: they do not change the time. Prints the ratios, and writes
a row, which replaces an earlier row of the same measurement.
"""

import argparse
import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rows import facts, number, replace_rows
from himo.evaluate import Encoder, read_himo_docci
from himo.evaluate.encode import distinct_tokens
from himo.evaluate.shared_prefixes import TextBatch, TokenRows, shared_rows, text_batches
from himo.model import CONFIGS, HiMoCLIP, named_config
from himo.transforms import Preprocess

TOLERANCE = 1e-5  # between the features of any two ways; otherwise there is no row
COLUMNS = (
    "model",
    "context",
    "captions",
    "texts",  # captions and prefixes, before equal ones are joined
    "batch_size",
    "tokens_padded",
    "tokens_sorted",
    "tokens_shared",  # each with what fills its rows up
    "time_s_padded",  # one run
    "time_s_sorted",  # medians over the rounds
    "time_s_shared",
    "padded_over_sorted",
    "sorted_over_shared",  # median, smallest and largest of the rounds' ratios
    "sorted_over_shared_min",
    "sorted_over_shared_max",
    "padded_over_shared",
    "largest_difference",  # of any feature, between any two ways
    "rounds",
    "load",
    "device",
    "torch",
    "threads",
    "commit",
    "date",
)
CELL = ("model", "context", "captions", "batch_size", "device", "threads")  # one row each
Way = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="HiMo-Docci's file of prefixes, JSON lines")
    parser.add_argument("--out", required=True, type=Path, help="csv file of the rows")
    parser.add_argument("--model", default="ViT-B-16", choices=CONFIGS, help="(%(default)s)")
    parser.add_argument("--context", type=int, default=248, help="tokens (%(default)s)")
    parser.add_argument("--captions", type=int, default=50, help="evenly spread (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="rows (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of the last two ways (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    replace_rows(args.out, [measure(args)], COLUMNS, CELL)


def measure(args: argparse.Namespace) -> dict[str, str]:
    """Prints the ratios of one measurement and returns its row."""
    load = os.getloadavg()[0]
    records, _ = read_himo_docci(args.data)
    chosen = records[:: max(1, len(records) // args.captions)][: args.captions]
    texts = [text for record in chosen for text in record.prefixes]
    torch.manual_seed(0)
    config = dataclasses.replace(named_config(args.model), context_length=args.context)
    encoder = Encoder(HiMoCLIP(config).eval(), Preprocess.of(config), args.batch_size)
    tokens, row_of_text, _ = distinct_tokens(texts, args.context)
    every = tokens[row_of_text.numpy()]
    parts = _parts(len(every), args.batch_size)
    apart = [TextBatch(part) for part in _parts(len(tokens), args.batch_size)]
    together = text_batches(tokens, args.batch_size)

    def padded() -> Tensor:
        return torch.cat([_padded(encoder.model, every[p]) for p in parts])

    def apart_features() -> Tensor:
        return _in_order(encoder, tokens, apart)[row_of_text]

    def shared() -> Tensor:
        return _in_order(encoder, tokens, together)[row_of_text]

    found, times = _timed({"padded": padded, "sorted": apart_features, "shared": shared}, args)
    difference = max(float((found[way] - found["shared"]).abs().max()) for way in found)
    if not difference <= TOLERANCE:
        raise SystemExit(f"features differ by {difference:.3g}, more than {TOLERANCE:g}")
    median = {way: statistics.median(values) for way, values in times.items()}
    pairs = zip(times["sorted"], times["shared"], strict=True)
    ratios = [before / after for before, after in pairs]
    counts = {
        "padded": every.size,
        "sorted": sum(_longest(tokens, batch) for batch in apart),
        "shared": sum(_tokens(tokens, batch) for batch in together),
    }
    over_padded = median["padded"] / median["shared"]
    print(
        f"{len(texts)} texts, {args.context} tokens: {statistics.median(ratios):.2f} times as fast "
        f"as sorted ({min(ratios):.2f} to {max(ratios):.2f}), {over_padded:.2f} as padded"
    )
    given = {name: str(getattr(args, name)) for name in ("model", "context", "batch_size")}
    return (
        given
        | {"captions": str(len(chosen)), "texts": str(len(texts)), "rounds": str(args.rounds)}
        | {f"tokens_{way}": str(count) for way, count in counts.items()}
        | {f"time_s_{way}": number(seconds) for way, seconds in median.items()}
        | {
            "padded_over_sorted": number(median["padded"] / median["sorted"]),
            "sorted_over_shared": number(statistics.median(ratios)),
            "sorted_over_shared_min": number(min(ratios)),
            "sorted_over_shared_max": number(max(ratios)),
            "padded_over_shared": number(over_padded),
            "largest_difference": f"{difference:.1e}",
            "load": f"{load:.1f}",
        }
        | {name: value for name, value in facts("cpu", args.threads).items() if name in COLUMNS}
    )


def _timed(
    ways: dict[str, Way], args: argparse.Namespace
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    found: dict[str, Tensor] = {}
    times: dict[str, list[float]] = {way: [] for way in ways}
    with torch.no_grad():
        for repeat in range(args.rounds):
            for way, run in ways.items():
                if way == "padded" and repeat:
                    continue  # many times as long as both others
                start = time.perf_counter()
                found[way] = run()
                times[way].append(time.perf_counter() - start)
    return found, times


def _padded(model: HiMoCLIP, tokens: TokenRows) -> Tensor:
    batch = torch.from_numpy(tokens.astype(np.int32))
    return F.normalize(model.encode_text(batch, max_length=batch.shape[1]), dim=-1)


def _in_order(encoder: Encoder, tokens: TokenRows, batches: list[TextBatch]) -> Tensor:
    features = torch.empty(len(tokens), encoder.model.config.embed_dim)
    for batch in batches:
        features[batch.texts] = encoder.encode_batch(tokens[batch.texts], batch)
    return features


def _parts(count: int, size: int) -> list["np.ndarray[tuple[int], np.dtype[np.int64]]"]:
    return np.array_split(np.arange(count), math.ceil(count / size))


def _tokens(tokens: TokenRows, batch: TextBatch) -> int:
    if batch.sizes is None:
        return _longest(tokens, batch)
    return shared_rows(tokens[batch.texts], batch.sizes).tokens.numel()


def _longest(tokens: TokenRows, batch: TextBatch) -> int:
    return len(batch.texts) * int(tokens[batch.texts].argmax(axis=1).max() + 1)


if __name__ == "__main__":
    main()
