"""Peak memory of a rank's loss with each strategy; run by torchrun, writes FOLDER/RANK.json."""

import json
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from himo.parallel import end_process
from himo_kernels import distributed as hkd

ROWS, FEATURES = 512, 1024
dist.init_process_group("gloo")


def mib(field: str) -> float:
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) / 1024


peaks = {}
for strategy, rows in (("ring", 8), ("ring", ROWS), ("gather", ROWS)):  # the first warms up
    features = [torch.randn(rows, FEATURES).requires_grad_() for _ in range(3)]
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = mib("VmRSS")
    sum(hkd.dual_info_nce(*features, 10.0, strategy=strategy)).backward()
    peaks[strategy] = mib("VmHWM") - before
Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(peaks))
dist.destroy_process_group()
end_process()
