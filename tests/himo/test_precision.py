"""The dtype of the towers' products: half precision only where it is faster."""

import torch
from fresh_process import run_python
from torch.utils._python_dispatch import TorchDispatchMode

from himo import precision
from himo.config import TrainConfig
from himo.objective import Objective
from himo.parallel import Ranks
from himo.train import build_model

CPU = torch.device("cpu")
# What oneDNN and ATen would find on a processor without AVX-512, whatever this one has.
NARROW = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
ASKED = """
import torch
from himo.precision import products_dtype, resolve
cpu = torch.device("cpu")
print([resolve(asked, cpu) for asked in ("fp32", "amp_bf16", "auto")])
print([products_dtype(dtype, cpu) for dtype in (torch.bfloat16, torch.float16, torch.float64)])
"""


def test_without_instructions_for_it_half_precision_is_not_used():
    resolved, dtypes = run_python("-c", ASKED, **NARROW).splitlines()
    line = "precision fp32: bfloat16 products are slower than float32 on this processor"
    assert resolved == str([("fp32", ""), ("fp32", line), ("fp32", line)])
    assert dtypes == str([torch.float32, torch.float32, torch.float64])


def test_the_faster_dtype_is_chosen(monkeypatch):
    for faster, expected in ((True, "amp_bf16"), (False, "fp32")):
        monkeypatch.setattr(precision, "is_faster_than_float32", lambda *_, f=faster: f)
        for asked in ("auto", "amp_bf16"):
            assert precision.resolve(asked, CPU)[0] == expected
            assert precision.resolve(asked, CPU, Ranks())[0] == expected  # as a run asks
        assert precision.resolve("amp", CPU)[0] == ("amp" if faster else "fp32")
        assert precision.resolve("fp32", CPU) == ("fp32", "")
    assert precision.resolve("auto", CPU)[1].startswith("precision fp32: bfloat16 products")


def test_a_step_multiplies_in_the_chosen_dtype(generator):
    # Every product of a step, forward and backward, by the dtype of its first factor.
    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.__name__.partition(".")[0] in ("mm", "addmm", "bmm", "baddbmm", "convolution"):
                found.add(next(a.dtype for a in args if isinstance(a, torch.Tensor)))
            return op(*args, **(kwargs or {}))

    for asked, expected in (("fp32", {torch.float32}), ("amp_bf16", {torch.bfloat16})):
        settings = TrainConfig(train_data="x", model="tiny", precision=asked)
        model = build_model(settings, CPU)
        side, length = model.config.image_resolution, model.config.context_length
        images = torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=generator)
        tokens = torch.randint(1, 1000, (2, length), dtype=torch.int32, generator=generator)
        found: set[torch.dtype] = set()
        with Products():
            Objective(model, settings).backward(images, tokens, length, 2)
        assert expected <= found
        assert asked == "amp_bf16" or torch.bfloat16 not in found
