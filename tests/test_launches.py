"""How many kernels a call launches, and that no call syncs with the host.

Counted on meta tensors, which have no values, so that an .item() raises. The official batch is
128 x 768. A launch costs about 5 us on the host and 2 to 3 us on the device, so these numbers bound
the time of a small batch. Justify an increase.
"""

import json

import pytest
from fresh_process import run_python

pytest.importorskip("triton", reason="needs Triton")

MEAN = {"aten.mean.dim": 1}
PARTS = {"aten.sum.dim_IntList": 1}  # the sum of a split-K matmul
EIGENSOLVER = {
    "_tridiagonalise_kernel": 1,
    "_bisect_kernel": 1,
    "_inverse_iteration_kernel": 1,
    "_back_transform_kernel": 1,
    "_matmul_kernel": 3,  # two of Newton-Schulz, one for both products of the certificate
    "_finish_kernel": 1,
}


def sum_of(*counts: dict[str, int]) -> dict[str, int]:
    names = {name for count in counts for name in count}
    return {name: sum(count.get(name, 0) for count in counts) for name in names}


SOLVED = sum_of(MEAN, {"_matmul_kernel": 1}, EIGENSOLVER)  # mean, moment, eigenpairs and rank
EXPECTED = {
    "covariance_fwd 128x768": {**MEAN, "_matmul_kernel": 1},
    "covariance_bwd 128x768": {"aten.add.Tensor": 1, "aten.div.Tensor": 1, "_matmul_kernel": 1},
    "pca_reconstruct_fwd 128x768": sum_of(
        SOLVED, PARTS, {"_matmul_kernel": 2, "aten.where.self": 1}
    ),
    "pca_reconstruct_bwd 128x768": {
        "aten.mean.dim": 2,  # of G, and of V
        "_matmul_kernel": 5,
        **PARTS,
        "_weigh_pairs_kernel": 1,
    },
    "pca_reconstruct_fwd 768x128": sum_of(
        SOLVED, PARTS, {"_matmul_kernel": 2, "aten.where.self": 1}
    ),
    "pca_reconstruct_bwd 768x128": {
        "aten.mean.dim": 1,
        "_matmul_kernel": 8,
        **PARTS,
        "_weigh_pairs_kernel": 1,
        "aten.add.Tensor": 2,  # B + B^T, and dC
    },
}
EXPECTED |= {
    "dual_info_nce_fwd 128x768": {
        "statistics_kernel": 2,
        "nll_kernel": 2,
        "aten.sum.dim_IntList": 2,
    },
    "dual_info_nce_bwd 128x768": {
        "positives_kernel": 2,
        "grad_logits_kernel": 2,
        "aten.baddbmm.out": 4,
        "gradient_kernel": 4,
        "scale_gradient_kernel": 2,
    },
}
EXPECTED |= {
    "normalize_fwd 128x768": {"_normalize_fwd_kernel": 1},
    "normalize_bwd 128x768": {"_normalize_bwd_kernel": 1},
}
# The kernels of HiMoLoss at 128 x 768 and how often it calls each: images, texts and components are
# normalised. HiMoLoss.make_graphed launches two graphs instead.
HEAD = {
    **dict.fromkeys(("normalize_fwd", "normalize_bwd"), 3),
    **dict.fromkeys(("pca_reconstruct_fwd", "pca_reconstruct_bwd"), 1),
    **dict.fromkeys(("dual_info_nce_fwd", "dual_info_nce_bwd"), 1),
}
EXPECTED |= {  # of one loss over ranks, 128 rows of 1024
    "info_nce_block_fwd 128x1024": {"statistics_kernel": 1, "log_odds_kernel": 2},
    "info_nce_block_bwd 128x1024": {
        "grad_logits_kernel": 1,
        "aten.baddbmm.out": 2,
        "gradient_kernel": 2,
        # Divides the weights by the largest.
        **{"aten.cat.default": 1, "aten.abs.default": 1, "aten.amax.default": 1},
        **{"aten.clamp_min.default": 1, "aten.div.Tensor": 2},
    },
}
# Most are torch's elementwise kernels over n numbers; official training does not run these.
TOTALS = {"pca_fwd 128x768": 23, "pca_bwd 128x768": 56}

SCRIPT = """
import json
import torch
from himo_kernels import _triton
from himo_kernels.aot import device_launches
from himo_kernels.covariance.triton import covariance_bwd, covariance_fwd
from himo_kernels.info_nce import triton as info_nce
from himo_kernels.info_nce.compose import Direction, Settings
from himo_kernels.normalize.triton import normalize_bwd, normalize_fwd
from himo_kernels.pca import triton as pca

_triton.aot_target = 90  # its tiles are used
counts = {}

def count(name, shape, function, *arguments):
    result = []
    launches = device_launches(lambda: result.append(function(*arguments)))
    counts[f"{name} {shape[0]}x{shape[1]}"] = launches
    return result[0]

rule = torch.empty((), dtype=torch.float64, device="meta"), (1e-12, 0.0)
for shape in ((128, 768), (768, 128)):
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    mean, moment = count("covariance_fwd", shape, covariance_fwd, x, torch.float32)
    count("covariance_bwd", shape, covariance_bwd, mean, moment, x, mean)
    grad, rank, *saved = count("pca_reconstruct_fwd", shape, pca.pca_reconstruct_fwd, x, *rule)
    count(
        "pca_reconstruct_bwd", shape, pca.pca_reconstruct_bwd, grad, x, *saved, rank, 1e-6, True
    )
    mean, values, components, rank, vectors = count("pca_fwd", shape, pca.pca_fwd, x, *rule)
    grads = (mean, values, components)
    count("pca_bwd", shape, pca.pca_bwd, *grads, x, mean, values, vectors, rank, 1e-6)
# float32: for 16-bit matmuls torch makes copies on meta that it does not make on the device.
x, scale, shape = torch.empty(128, 768, device="meta"), torch.empty((), device="meta"), (128, 768)
inputs = (x, x, x, scale)
forward = info_nce.dual_info_nce_fwd
outputs = count("dual_info_nce_fwd", shape, forward, *inputs, 0.0)
nlls = [output for index, output in enumerate(outputs) if index % 3]
backward = info_nce.dual_info_nce_bwd
settings = (0.0, True, [True] * 4)
count("dual_info_nce_bwd", shape, backward, *outputs[::3], *inputs, *nlls, *settings)
count("normalize_fwd", shape, normalize_fwd, x)
count("normalize_bwd", shape, normalize_bwd, x, x)
keys, shape = torch.empty(1024, 768, device="meta"), (128, 1024)
of_rows, of_keys = torch.empty(128, device="meta"), torch.empty(1024, device="meta")
forward, backward = info_nce.info_nce_block_fwd, info_nce.info_nce_block_bwd
count("info_nce_block_fwd", shape, forward, x, keys, scale, of_rows, of_keys, 256)
directions = (Direction(*(of_rows,) * 3), Direction(*(of_keys,) * 3))
settings = (256, Settings(0.1, True), 1024)
count("info_nce_block_bwd", shape, backward, x, keys, scale, *directions, *settings)
print(json.dumps(counts))
"""


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, int]]:
    # In a fresh process: kernels defined for the interpreter do not launch.
    return json.loads(run_python("-c", SCRIPT, TRITON_INTERPRET="0"))


@pytest.mark.parametrize("call", EXPECTED)
def test_every_launch_is_expected(call, counts):
    assert counts[call] == EXPECTED[call]


def test_the_official_reconstruction_is_bounded(counts):
    # 33 and 19 with one kernel per step of the eigensolver and of the gradient's formula.
    assert sum(counts["pca_reconstruct_fwd 128x768"].values()) <= 14
    assert sum(counts["pca_reconstruct_bwd 128x768"].values()) <= 9


def test_the_launches_of_the_official_head(counts):
    launches = {name: sum(counts[f"{name} 128x768"].values()) for name in HEAD}
    assert sum(times * launches[name] for name, times in HEAD.items()) == 49


@pytest.mark.parametrize("call", TOTALS)
def test_the_fit_alone_is_bounded(call, counts):
    assert sum(counts[call].values()) <= TOTALS[call]


@pytest.mark.slow
def test_the_counter_sees_launches_alone_and_refuses_a_wait():
    script = """
import torch
from himo_kernels.aot import device_launches

x = torch.empty(4, 4, device="meta")
print(dict(device_launches(lambda: x.new_empty(3).view(3, 1).expand(3, 2).mT.add(1).sum())))
try:
    device_launches(lambda: float(x.sum()))
except RuntimeError as error:
    print("refused")
"""
    lines = run_python("-c", script, TRITON_INTERPRET="0").splitlines()
    assert lines == ["{'aten.add.Tensor': 1, 'aten.sum.default': 1}", "refused"]
