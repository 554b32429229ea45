"""The exactness checks on each rank; run by torchrun, writes FOLDER/RANK.json.

Each check is a relative error of this rank's values or gradients against the joined batch in one
process. All ranks draw the same batch and use their own rows of it.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import row_losses, shares
from ranks import DTYPES, RANK, SEED, WORLD, finish, found, leaves, own
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector
from torch.utils._python_dispatch import TorchDispatchMode

import himo_kernels
from benchmarks.baselines import released
from himo.accumulate import cached_backward
from himo_kernels import distributed as hkd
from himo_kernels import testing as hkt
from himo_kernels.distributed import loss as joined_loss
from himo_kernels.distributed.wire import Rows, Transfer
from himo_kernels.info_nce.block import BLOCK
from himo_kernels.nn import PRESETS, HiMoLoss

# Rows of each rank, and the features. A single process has at least 13 rows: with fewer, a float32
# gradient loses too many digits by cancellation to be accurate to six.
SHAPES = {
    "N > D": ([16] * WORLD, 12),
    "N < D": ([5] * WORLD if WORLD > 1 else [13], 64),
    "uneven": ([9, 16, 4, 11][:WORLD] if WORLD > 1 else [20], 12),
    "uneven, N < D": ([3, 5, 1, 4][:WORLD] if WORLD > 1 else [13], 64),
    "an empty rank": ([0, 20, 13, 7][:WORLD] if WORLD > 1 else [20], 12),
    "one row each": ([1] * WORLD if WORLD > 1 else [13], 8),
}


def batch(counts: list[int], width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts and scale of the joined batch; a PCA of them is well conditioned.

    Gradients grow, and lose digits, as 1 / gap at the cut: batches with a gap below 10 % of the
    last kept eigenvalue are drawn again, for each PCA that the checks make of them. One process
    rounds the normalised texts to float32 before its PCA, which the gap divides too: 20 %. A logit
    of size s is s eps wrong in float32: s is small enough that 1e-6 is a bound on the exchange.
    """
    rows, least = sum(counts), 0.1 if WORLD > 1 else 0.2
    generator = torch.Generator().manual_seed(SEED + 100 * rows + width)
    while True:
        images = torch.randn(rows, width, dtype=torch.float64, generator=generator)
        texts = hkt.power_law(rows, width, dtype=torch.float64, generator=generator)
        texts = texts + 0.1 * images
        pieces = [texts, *(piece for piece in texts.split(counts) if len(piece) > 1)]
        if all(gap(piece, tau) > least for piece in pieces for tau in (0.85, 0.9)):
            scale = torch.tensor(5.0, dtype=dtype)
            return images.to(dtype), texts.to(dtype), scale


def gap(texts: Tensor, tau: float) -> float:
    pca = himo_kernels.pca(F.normalize(texts, dim=-1), tau)
    values = [*pca.eigenvalues.tolist(), 0.0]
    rank = int(pca.rank)
    return 1 - values[rank] / values[rank - 1]


def worst(
    actual: list[Tensor], exact: list[Tensor], group: dist.ProcessGroup | None = None
) -> float:
    """The largest relative error of these tensors, each the rows of all ranks joined."""
    squares = torch.zeros(2, len(actual), dtype=torch.float64)
    for i, (a, e) in enumerate(zip(actual, exact, strict=True)):
        e = e.detach().double()
        squares[:, i] = torch.stack([(a.detach().double() - e).square().sum(), e.square().sum()])
    dist.all_reduce(squares, group=group)
    difference, norm = squares.sqrt()
    return float((difference / norm).max())


def check_loss(
    preset: str, scope: str, shape: str, dtype: str, strategy: str, both: bool = False
) -> None:
    counts, width = SHAPES[shape]
    images, texts, scale = batch(counts, width, DTYPES[dtype])
    if both:  # the images' PCA too: turned texts have the same gaps
        generator = torch.Generator().manual_seed(width)
        noise = torch.randn(width, width, dtype=torch.float64, generator=generator)
        images = (texts.double() @ torch.linalg.qr(noise)[0]).to(texts.dtype)
    settings = PRESETS[preset]
    upstream = [1.0 - 0.3 * rank for rank in range(WORLD)]  # differs between ranks

    def alone(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This rank's share, its gradients of both towers, and the scale's whole gradient."""
        joined = leaves(images.to(dtype), texts.to(dtype), scale.to(dtype))
        parts = shares(
            *joined,
            counts,
            scope=scope,
            tau=settings["variance_threshold"],
            smoothing=settings["label_smoothing"],
            normalize_components=settings["normalize_components"],
            decompose_images=both,
            constants=not settings["gather_with_grad"],
        )
        total = sum(weight * part for weight, part in zip(upstream, parts, strict=True))
        grads = torch.autograd.grad(total, joined)
        return parts[RANK], own(grads[0], counts), own(grads[1], counts), grads[2]

    *exact, exact_scale = alone(torch.float64)
    mean = exact[0].detach().clone()
    dist.all_reduce(mean)
    mean /= WORLD

    def errors(actual: list[Tensor], grad_scale: Tensor) -> tuple[float, float]:
        # The gradient of log s is a difference of means of logits, each of the size of the loss,
        # and may cancel to zero, so its error is relative to the loss.
        difference = scale.double() * (grad_scale.double() - exact_scale) / mean
        return worst(actual, exact), float(difference.abs())

    mine = leaves(own(images, counts), own(texts, counts), scale)
    loss = HiMoLoss(preset, pca_scope=scope, strategy=strategy, decompose_images=both)
    share = loss(*mine)
    grads = torch.autograd.grad(upstream[RANK] * share, mine)
    grad_scale = grads[2].double().clone()
    dist.all_reduce(grad_scale)
    together = errors([share, *grads[:2]], grad_scale)
    # The float32 error of PyTorch in one process, which the exchange does not cause; 0 in float64.
    *eager, eager_scale = alone(DTYPES[dtype])
    rounding = errors(eager, eager_scale)
    name = f"{'both ' if both else ''}{preset} {scope}, {shape}, {dtype}, {strategy}"
    for check, error, one in zip(("loss", "scale"), together, rounding, strict=True):
        found[f"{check} {name}"] = max(0.0, error - one)


def check_released(strategy: str) -> None:
    # The official preset on several ranks, against the released code's semantics on the same ranks.
    counts, width = SHAPES["N > D"]
    images, texts, scale = batch(counts, width, torch.float64)
    theirs = leaves(own(images, counts), own(texts, counts), scale)
    expected = released.himo_loss(*theirs)
    expected_grads = torch.autograd.grad(sum(expected), theirs)
    mine = leaves(own(images, counts), own(texts, counts), scale)
    actual = HiMoLoss("official", strategy=strategy, gap_eps=0.0)(*mine, output_dict=True)
    grads = torch.autograd.grad(sum(actual.values()), mine)  # and logit_scale's
    values = [actual["contrastive_loss"], actual["component_loss"]]
    found[f"released code, values, {strategy}"] = worst(values, list(expected))
    found[f"released code, gradients, {strategy}"] = worst(list(grads), list(expected_grads))


class Towers(nn.Module):
    """Two small towers and a temperature: a minimal model for DDP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(width, 24), nn.Tanh(), nn.Linear(24, width))
        self.text = nn.Sequential(nn.Linear(width, 24), nn.Tanh(), nn.Linear(24, width))
        self.log_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image(images), self.text(texts), self.log_scale.exp()


def check_ddp(shape: str, dtype: str, strategy: str) -> None:
    counts, width = SHAPES[shape]
    images, texts, _ = batch(counts, width, DTYPES[dtype])

    def gradients_alone(dtype: torch.dtype) -> Tensor:
        towers = Towers(width).to(dtype)
        loss = torch.stack(shares(*towers(images.to(dtype), texts.to(dtype)), counts)).mean()
        return parameters_to_vector(torch.autograd.grad(loss, list(towers.parameters())))

    exact = gradients_alone(torch.float64)
    # The error of towers in this dtype alone; 0 in float64.
    rounding = hkt.relative_error(gradients_alone(DTYPES[dtype]), exact)
    together = DistributedDataParallel(Towers(width).to(DTYPES[dtype]))
    HiMoLoss(strategy=strategy)(*together(own(images, counts), own(texts, counts))).backward()
    grads = parameters_to_vector([parameter.grad for parameter in together.parameters()])
    error = hkt.relative_error(grads, exact)
    found[f"after DDP's mean, {shape}, {dtype}, {strategy}"] = max(0.0, error - rounding)
    del together  # before the process group, which DDP's reducer must not outlive


def check_accumulation(dtype: str, parts: int) -> None:
    # Micro-batches of unequal sizes and numbers on each rank, in towers without dropout.
    counts, width = SHAPES["uneven"]
    images, texts, _ = batch(counts, width, DTYPES[dtype])
    mine = own(images, counts), own(texts, counts)
    gradients = []
    for pieces in (1, parts):
        towers = DistributedDataParallel(Towers(width).to(DTYPES[dtype]))
        split = zip(*(tensor.tensor_split(pieces) for tensor in mine), strict=True)
        loss = HiMoLoss()
        cached_backward(towers, lambda *features: {"loss": loss(*features)}, list(split))  # noqa: B023
        gradients.append(parameters_to_vector([p.grad for p in towers.parameters()]))
    found[f"accumulation of {parts}, {dtype}"] = hkt.relative_error(*gradients)


def runs(backend: str, *tensors: Tensor) -> bool:
    """Whether blocks over several ranks can run on it; over two if Triton is interpreted."""
    if backend == "triton" and WORLD != 2:
        return False
    return backend == "auto" or BLOCK.why_not(backend, *tensors) is None


def check_info_nce(dtype: str, strategy: str, backend: str, shape: str = "uneven") -> None:
    counts, width = SHAPES[shape]
    images, texts, scale = batch(counts, width, DTYPES[dtype])
    if not runs(backend, images):
        return
    joined = leaves(images.double(), texts.double(), scale.double())
    rows = row_losses(*joined, 0.1, False).split(counts)
    exact = rows[RANK].sum() * WORLD / sum(counts)
    exact_grads = torch.autograd.grad(
        sum(part.sum() for part in rows) * WORLD / sum(counts), joined
    )
    mine = leaves(own(images, counts), own(texts, counts), scale)
    share = hkd.info_nce(*mine, strategy=strategy, label_smoothing=0.1, backend=backend)
    grads = torch.autograd.grad(share, mine)
    found[f"info_nce, {shape}, {dtype}, {strategy}, {backend}"] = worst(
        [share, *grads[:2]], [exact, *(own(grad, counts) for grad in exact_grads[:2])]
    )


def check_backend_of_the_loss(backend: str) -> None:
    # The module passes its backend to the loss: bitwise equal to the function with that backend.
    counts, width = SHAPES["N > D"]
    images, texts, scale = batch(counts, width, torch.float32)
    mine = own(images, counts), own(texts, counts)
    if not runs(backend, *mine):
        return
    units = [himo_kernels.normalize(features, backend=backend) for features in mine]
    expected, _ = hkd.dual_info_nce(*units, units[1], scale, backend=backend)
    actual = HiMoLoss(backend=backend)(*mine, scale, output_dict=True)["contrastive_loss"]
    found[f"the module's backend, {backend}"] = float(not torch.equal(actual, expected))


def check_gather(dtype: torch.dtype, counts: list[int]) -> None:
    x = torch.randn(sum(counts), 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    (mine,) = leaves(own(x, counts))
    gathered = hkd.all_gather(mine)
    name = f"all_gather {counts} {dtype}"
    found[f"{name}, equal"] = float(not torch.equal(gathered.detach(), x))
    weights = torch.arange(x.numel(), dtype=torch.float64).view_as(x).remainder(7).to(dtype)
    gathered.backward((RANK + 1) * weights)
    expected = own(weights, counts) * (WORLD * (WORLD + 1) // 2)
    found[f"{name}, gradient"] = hkt.relative_error(mine.grad, expected)
    constants = hkd.all_gather(mine, differentiate=False)
    found[f"{name}, constants"] = float(constants.requires_grad or not torch.equal(constants, x))


def check_moments(name: str, x: Tensor, counts: list[int], tau: float, detach: bool) -> None:
    (joined,) = leaves(x)
    settings = {"differentiate_basis": not detach}
    exact, exact_rank = himo_kernels.pca_reconstruct(joined, tau, backend="reference", **settings)
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    (exact_grad,) = torch.autograd.grad(exact, joined, weights)
    (mine,) = leaves(own(x, counts))
    actual, rank = hkd.pca_reconstruct(mine, tau, **settings)
    (grad,) = torch.autograd.grad(actual, mine, own(weights, counts))
    found[f"moments, {name}, value"] = worst([actual], [own(exact, counts)])
    found[f"moments, {name}, gradient"] = worst([grad], [own(exact_grad, counts)])
    found[f"moments, {name}, rank"] = float(rank != exact_rank)


def check_degenerate(name: str) -> None:
    counts = [24] * WORLD
    x = hkt.DEGENERATE[name](sum(counts), 16, generator=torch.Generator().manual_seed(3))
    (mine,) = leaves(own(x.float(), counts))
    actual, _ = hkd.pca_reconstruct(mine)
    actual.sum().backward()
    found[f"degenerate, {name}"] = float(not (actual.isfinite().all() & mine.grad.isfinite().all()))


def check_subgroup(strategy: str) -> None:
    members = [rank for rank in range(WORLD) if rank != 1]
    group = dist.new_group(members)
    if RANK not in members:
        try:
            HiMoLoss(group=group)(torch.eye(3), torch.eye(3), 1.0)
        except ValueError as error:
            found[f"not a member, {strategy}"] = float("a member of" not in str(error))
        return
    place = members.index(RANK)
    counts = [7, 10, 9][: len(members)]
    images, texts, scale = batch(counts, 12, torch.float64)
    joined = leaves(images, texts, scale)
    exact = shares(*joined, counts)
    exact_grads = torch.autograd.grad(sum(exact), joined)
    mine = leaves(own(images, counts, place), own(texts, counts, place), scale)
    share = HiMoLoss(group=group, strategy=strategy)(*mine)
    grads = torch.autograd.grad(share, mine)
    found[f"sub-group, {strategy}"] = worst(
        [share, *grads[:2]],
        [exact[place], *(own(g, counts, place) for g in exact_grads[:2])],
        group,
    )


def check_traffic(strategy: str, shape: str) -> None:
    counts, width = SHAPES[shape]
    images, texts, scale = batch(counts, width, torch.float32)
    mine = leaves(own(images, counts), own(texts, counts), scale)
    loss = HiMoLoss(strategy=strategy)
    with hkd.count_traffic() as traffic:
        loss(*mine).backward()
    found[f"traffic, {shape}, {strategy}"] = {
        "calls": dict(traffic.calls),
        "bytes": dict(traffic.bytes),
        "rows": counts[RANK],
        "features": width,
    }


def check_floor(scope: str, shape: str) -> None:
    # The rank equals one process's at any scale, also for rows that differ only by float32
    # rounding, which float64 sums resolve.
    counts, width = SHAPES[shape]
    images, texts, scale = batch(counts, width, torch.float32)
    same = texts[:1] * (1 + 2.0**-23 * (torch.arange(len(texts)) % 2))[:, None]
    loss = HiMoLoss(pca_scope=scope, normalize_features=False)
    for name, rows in {"tiny": 1e-6 * texts, "same": same}.items():
        rank = loss.terms(own(images, counts), own(rows, counts), scale).rank
        whole = own(rows, counts) if scope == "local" else rows
        expected = himo_kernels.pca_reconstruct(whole)[1] if len(whole) else 0
        found[f"rank of {name} rows, {scope}, {shape}"] = float(rank != expected)
        if name == "same":
            found[f"no variance, {scope}, {shape}"] = float(rank != min(whole.shape))


def check_unchecked() -> None:
    # check_ranks=False: bitwise equal, without a collective for the agreement.
    counts, width = SHAPES["N > D"]
    images, texts, scale = batch(counts, width, torch.float32)
    results = []
    for check_ranks in (True, False):
        mine = leaves(own(images, counts), own(texts, counts), scale)
        with hkd.count_traffic() as traffic:
            share = HiMoLoss(check_ranks=check_ranks)(*mine)
            share = share + hkd.info_nce(*mine, check_ranks=check_ranks)
            results.append((share, *torch.autograd.grad(share, mine)))
        found[f"gathers, check_ranks={check_ranks}"] = float(traffic.calls["all_gather"])
    equal = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    found["check_ranks changes no bit"] = float(not equal)


class HostReads(TorchDispatchMode):
    """Counts values read on the host."""

    count = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        self.count += operator is torch.ops.aten._local_scalar_dense.default
        return operator(*arguments, **(named or {}))


def check_order() -> None:
    # The ring's calls as they happen: sends, waits that may block, and products.
    counts, width = SHAPES["N > D"]
    images, texts, scale = batch(counts, width, torch.float64)
    events: list[str] = []

    def logged(name: Callable[..., str], call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            events.append(name(*arguments))
            return call(*arguments)

        return run

    def wait(transfer: Transfer) -> str:
        return "wait" if transfer._requests else ""

    replaced = {
        (Rows, "shift"): lambda rows, pairs: " ".join(["send", *pairs]) if pairs else "",
        (Transfer, "wait"): wait,
        (joined_loss, "block_fwd"): lambda *_: "product",
        (joined_loss, "block_bwd"): lambda *_: "product",
    }
    originals = {key: getattr(*key) for key in replaced}
    for key, name in replaced.items():
        setattr(*key, logged(name, originals[key]))
    mine = leaves(own(images, counts), own(texts, counts), scale)
    with HostReads() as reads:
        share = hkd.info_nce(*mine, strategy="ring", check_ranks=False, backend="reference")
        split = len(events)
        torch.autograd.grad(share, mine)
    for key, original in originals.items():
        setattr(*key, original)
    found["events of the forward"] = [event for event in events[:split] if event]
    found["events of the backward"] = [event for event in events[split:] if event]
    found["host reads of the ring"] = float(reads.count)


def check_graphed() -> None:
    try:
        HiMoLoss().make_graphed(torch.eye(3), torch.eye(3), torch.tensor(1.0))
    except ValueError as error:
        found["make_graphed is refused"] = float("one process, got a group" not in str(error))


def run(check: Callable[..., None], *options: object) -> None:
    for arguments in itertools.product(*options):
        check(*arguments)


run(check_loss, PRESETS, ("global", "local"), SHAPES, DTYPES, ("gather", "ring"))
of_both = ("N > D", "uneven, N < D", "an empty rank")
run(check_loss, PRESETS, ("global", "local"), of_both, DTYPES, ("gather", "ring"), (True,))
run(check_ddp, ("N > D", "N < D", "uneven"), DTYPES, ("gather", "ring"))
run(check_info_nce, DTYPES, ("gather", "ring"), ("auto", *BLOCK.backends))
run(check_info_nce, DTYPES, ("gather", "ring"), ("auto",), ("an empty rank", "one row each"))
run(check_floor, ("global", "local"), SHAPES)
run(check_accumulation, DTYPES, (2, 4))
gather_counts = [SHAPES[shape][0] for shape in ("N > D", "uneven", "an empty rank")]
run(check_gather, (torch.bfloat16, torch.float32, torch.float64), gather_counts)
if WORLD > 1:
    run(check_traffic, ("gather", "ring"), SHAPES)
    run(check_subgroup, ("gather", "ring"))
    check_unchecked()
    check_graphed()
    check_order()
    run(check_backend_of_the_loss, BLOCK.backends)
run(check_released, ("gather", "ring"))
spread = hkt.power_law(
    20 * WORLD, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
)
for detach in (False, True):
    for counts in ([20] * WORLD, [40, *[20] * (WORLD - 2), 0] if WORLD > 1 else [20]):
        check_moments(f"{counts} detach={detach}", spread, counts, 0.9, detach)
        check_moments(f"{counts} all kept, detach={detach}", spread, counts, 1.0, detach)
    # Means a million times the spread: a difference of two sums would lose every digit.
    check_moments(f"far mean, detach={detach}", spread + 1e6, [20] * WORLD, 0.9, detach)
run(check_degenerate, hkt.DEGENERATE)
finish()
