"""Rows of benchmarks/results/cpu/demo.csv from the run folders of `make demo`.

    python -m benchmarks.demo_rows demo/logs/himo demo/logs/clip >> benchmarks/results/cpu/demo.csv

Run it on the same commit as the demo: a row records the commit of the working tree.
"""

import csv
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def row(run: Path) -> list[Any]:
    """The values of one run, in the order of the columns of demo.csv."""
    config = json.loads((run / "config.json").read_text())
    result = json.loads((run / "eval.json").read_text())
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    retrieval, himo = result["retrieval"], result["himo"]
    ways = [retrieval[way] for way in ("image_to_text", "text_to_image")]
    return [
        config["loss"],
        config["seed"],
        *(way[f"R@{k}"] for k in (1, 10) for way in ways),
        retrieval["chance_R@1"],
        *(round(himo[f"HiMo@{k}"]["value"], 4) for k in ("2", "3", "K")),
        last["rank"],
        last["step"],
        result["protocol"]["images"],
        config["threads"],
        config["versions"]["torch"],
        _git("describe", "--always", "--dirty", "--exclude=*"),
        datetime.date.today().isoformat(),
    ]


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    csv.writer(sys.stdout, lineterminator="\n").writerows(row(Path(path)) for path in sys.argv[1:])
