"""One entry per operator: its inputs, candidates and oracle. Its cost model is in costs.py.

The library's candidates are all backends in the operator's table in himo_kernels, so a new backend
is measured without a change here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import himo_kernels
from benchmarks import costs
from benchmarks import inputs as draw
from benchmarks.baselines import eager, forms, peers, released
from benchmarks.cases import Case
from himo_kernels.dispatch import OPERATORS, backend_names
from himo_kernels.nn import PRESETS, HiMoLoss

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Call = Callable[[Inputs, Case], Outputs]


@dataclass(frozen=True)
class Candidate:
    """One implementation. refusal says why it cannot run this case."""

    name: str
    call: Call
    library: bool  # a himo_kernels backend: must meet its error budget
    auto: bool = False  # the backend that "auto" selects
    official: bool = False  # computes the official preset's loss for every preset
    compiled: bool = False
    refusal: str | None = None


@dataclass(frozen=True)
class Operation:
    """What the harness needs to know about an operator.

    formula is plain PyTorch. In float64 it is the oracle; in the case's dtype it gives the eager
    error of the budget. flops and elements model one call, (case, rank, with_backward) -> count.
    They are the same for every candidate, so rates are comparable.
    """

    inputs: Callable[[Case, torch.Generator], Inputs]
    library: Callable[[Inputs, Case, str], Outputs]
    formula: Call
    flops: Callable[[Case, int, bool], float]
    elements: Callable[[Case, bool], float]  # read and written at least once
    terms: Callable[[Case], int]  # length of the longest sum
    baselines: Mapping[str, Call] = field(default_factory=dict)
    compiled: tuple[str, ...] = ()  # the baselines that torch.compile is tried on too
    peers: int = 0  # losses per call; each is one call of another library's loss
    published: Mapping[str, tuple[Call, Callable[[Case], str | None]]] = field(default_factory=dict)
    rank: Callable[[Inputs, Case], int] | None = None


def operation(case: Case) -> Operation:
    return OPERATIONS[case.op]


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """The tensors of a case by argument name, equal on every device, without requires_grad."""
    generator = torch.Generator().manual_seed(seed)
    inputs = operation(case).inputs(case, generator)
    dtype = getattr(torch, case.dtype)
    # A model's scale and bias are float32 parameters, whatever the features' dtype.
    own = dict.fromkeys(("logit_scale", "logit_bias"), torch.promote_types(dtype, torch.float32))
    return {name: x.to(device, own.get(name, dtype)) for name, x in inputs.items()}


def leading_rows(inputs: Inputs, case: Case, rows: int) -> Inputs:
    """The inputs of the first rows samples."""
    return {
        name: x[..., :rows, :].contiguous() if x.dim() >= 2 and name != "basis" else x
        for name, x in inputs.items()
    }


def candidates(case: Case, inputs: Inputs) -> list[Candidate]:
    """Every backend in the operator's table, then every baseline, with refusals."""
    op = operation(case)
    found = _backends(case, op, inputs)
    for name, call in op.baselines.items():
        official = name == "released" and "preset" in case.config
        baseline = Candidate(name, call, library=False, official=official)
        found.append(baseline)
        if name in op.compiled:
            compiled = _compiled(call)
            found.append(replace(baseline, name=f"{name}+compile", call=compiled, compiled=True))
    for name, (call, why_not) in op.published.items():
        found.append(Candidate(name, call, library=False, refusal=why_not(case)))
    if op.peers:
        options = eager.loss_options(case.preset)
        for name, peer in peers.PEERS.items():
            refusal = peers.why_not(name, inputs["image_features"], *options)
            found.append(Candidate(name, _peer(peer, op.peers), library=False, refusal=refusal))
    return found


def _backends(case: Case, op: Operation, inputs: Inputs) -> list[Candidate]:
    def call(backend: str) -> Call:
        return lambda inputs, case: op.library(inputs, case, backend)

    tensors = tuple(inputs.values())
    if case.op == "himo_loss":  # several operators: a backend name applies to all
        parts = ("normalize", "pca_reconstruct", "dual_info_nce")
        features = inputs["text_features"]
        held = {name for part in parts for name in OPERATORS[part].backends}
        names = [name for name in backend_names() if name in held]
        reasons = {
            name: next(filter(None, (OPERATORS[p].why_not(name, features) for p in parts)), None)
            for name in names
        }
        backends = [Candidate("auto", call("auto"), library=True, auto=True)]
        return backends + [Candidate(n, call(n), True, refusal=reasons[n]) for n in names]
    table = OPERATORS[case.op]
    if case.op == "info_nce_pairs":
        tensors = tensors[:1]
    if case.op == "dual_info_nce_low_rank":  # argument order of the operator: rank, then scale
        *features, scale = tensors
        rank = torch.zeros((), dtype=torch.int64, device=scale.device)
        tensors = (*features, rank, scale)
    preferred = table.preferred(*tensors)
    return [
        Candidate(
            name,
            call(name),
            library=True,
            auto=name == preferred,
            refusal=table.why_not(name, *tensors),
        )
        for name in table.backends
    ]


def _compiled(call: Call) -> Call:
    # Lazy: torch.compile imports a compiler that most candidates do not need.
    compiled: list[Call] = []

    def run(inputs: Inputs, case: Case) -> Outputs:
        if not compiled:
            compiled.append(torch.compile(call, dynamic=False))
        return compiled[0](inputs, case)

    return run


def _peer(peer: Callable[..., Tensor], losses: int) -> Call:
    def call(inputs: Inputs, case: Case) -> Outputs:
        smoothing, _ = eager.loss_options(case.preset)
        texts = [inputs["text_features"]]
        if losses == 2:
            texts.append(draw.component(inputs))
        image, scale = inputs["image_features"], inputs["logit_scale"]
        return tuple(peer(image, text, scale, smoothing) for text in texts)

    return call


# Calls.


def _library_loss(inputs: Inputs, case: Case, backend: str) -> Outputs:
    smoothing, keys = eager.loss_options(case.preset)
    losses = getattr(himo_kernels, case.op)(
        **inputs, label_smoothing=smoothing, differentiate_keys=keys, backend=backend
    )
    return losses if isinstance(losses, tuple) else (losses,)


def _clip(inputs: Inputs, case: Case) -> Outputs:
    image, scale = inputs["image_features"], inputs["logit_scale"]
    options = eager.loss_options(case.preset)
    texts = [inputs["text_features"]]
    if case.op != "info_nce":
        texts.append(draw.component(inputs))
    return tuple(eager.clip_loss(image, text, scale, *options) for text in texts)


def _library_sigmoid(inputs: Inputs, case: Case, backend: str) -> Outputs:
    return (himo_kernels.sigmoid_loss(**inputs, backend=backend),)


def _siglip(loss: Callable[..., Tensor]) -> Call:
    return lambda inputs, case: (loss(*inputs.values()),)


def _released_dual(inputs: Inputs, case: Case) -> Outputs:
    features = (inputs["image_features"], inputs["text_features"], draw.component(inputs))
    gathered = tuple(x.detach() for x in features)
    return released.dual_loss(*features, inputs["logit_scale"], gathered)


def _library_head(inputs: Inputs, case: Case, backend: str) -> Outputs:
    head = HiMoLoss(case.preset, variance_threshold=_head_tau(case), backend=backend)
    return (head(*inputs.values()),)


def _head(hide: Callable[[Tensor, float], Tensor]) -> Call:
    return lambda inputs, case: (
        eager.himo_loss(*inputs.values(), case.preset, _head_tau(case), hide),
    )


def _released_head(inputs: Inputs, case: Case) -> Outputs:
    losses = released.himo_loss(*inputs.values(), ratio=_head_tau(case))
    return (losses[0] + losses[1],)


def _head_tau(case: Case) -> float:
    return PRESETS[case.preset]["variance_threshold"]


def _moment(side: str) -> Call:
    return lambda inputs, case: eager.moment(inputs["x"], side)


def _library_moment(inputs: Inputs, case: Case, backend: str) -> Outputs:
    return getattr(himo_kernels, case.op)(inputs["x"], backend=backend)


def _normalize(inputs: Inputs, case: Case) -> Outputs:
    return (F.normalize(inputs["features"], dim=-1),)


def _library_normalize(inputs: Inputs, case: Case, backend: str) -> Outputs:
    return (himo_kernels.normalize(inputs["features"], backend=backend),)


def _library_hide(inputs: Inputs, case: Case, backend: str) -> Outputs:
    return himo_kernels.pca_reconstruct(inputs["x"], case.tau, backend=backend)[:1]


def _hide(hide: Callable[[Tensor, float], Tensor]) -> Call:
    return lambda inputs, case: (hide(inputs["x"], case.tau),)


def _released_hide(inputs: Inputs, case: Case) -> Outputs:
    x = inputs["x"]
    if x.dim() == 2:
        return (released.cumulative_ratio_pca(x, case.tau),)
    return (torch.stack([released.cumulative_ratio_pca(problem, case.tau) for problem in x]),)


def _rank_of(x: Tensor, tau: float) -> int:
    # The rank of the first problem of the batch.
    _, rank = himo_kernels.pca_reconstruct(x.detach(), tau)
    return int(rank.flatten()[0])


def _features(case: Case) -> int:
    return case.D


def _longest(case: Case) -> int:
    return max(case.N, case.D)


OPERATIONS: dict[str, Operation] = {
    **{
        side: Operation(
            inputs=draw.samples,
            library=_library_moment,
            formula=_moment(side),
            flops=costs.moment_flops,
            elements=costs.moment_elements,
            terms=_longest,
            baselines={"eager": _moment(side)},
            compiled=("eager",),
        )
        for side in ("covariance", "gram")
    },
    "pca_reconstruct": Operation(
        inputs=draw.samples,
        library=_library_hide,
        formula=_hide(eager.hide_svd),
        flops=costs.hide_flops,
        elements=costs.hide_elements,
        terms=_longest,
        baselines={
            "released": _released_hide,
            "eager svd": _hide(eager.hide_svd),
            "eager eigh": _hide(eager.hide_eigh),
        },
        compiled=("released", "eager eigh"),
        rank=lambda inputs, case: _rank_of(inputs["x"], case.tau),
    ),
    "normalize": Operation(
        inputs=draw.unnormalized_rows,
        library=_library_normalize,
        formula=_normalize,
        flops=costs.normalize_flops,
        elements=costs.normalize_elements,
        terms=_features,
        baselines={"F.normalize": _normalize},
        compiled=("F.normalize",),
    ),
    "info_nce": Operation(
        inputs=lambda case, generator: draw.scaled(draw.pairs(case, generator)),
        library=_library_loss,
        formula=_clip,
        flops=costs.one_loss_flops,
        elements=costs.loss_elements(2),
        terms=_features,
        baselines={"open_clip": _clip},
        compiled=("open_clip",),
        peers=1,
    ),
    "dual_info_nce": Operation(
        inputs=draw.triples,
        library=_library_loss,
        formula=_clip,
        flops=costs.dual_loss_flops,
        elements=costs.loss_elements(3),
        terms=_features,
        baselines={"released": _released_dual, "open_clip": _clip},
        compiled=("released", "open_clip"),
        peers=2,
    ),
    "dual_info_nce_low_rank": Operation(
        inputs=draw.factors,
        library=_library_loss,
        formula=_clip,
        flops=costs.low_rank_flops,
        elements=costs.loss_elements(3),
        terms=_features,
        baselines={"released": _released_dual, "open_clip": _clip},
        compiled=("open_clip",),
        peers=2,
        rank=lambda inputs, case: case.inner,
    ),
    "info_nce_pairs": Operation(
        inputs=draw.sides,
        library=forms.library,
        formula=forms.formula,
        flops=costs.pairs_flops,
        elements=costs.pairs_elements,
        terms=_longest,
        baselines={"eager": forms.formula},
        compiled=("eager",),
        published=forms.PUBLISHED,
    ),
    "sigmoid_loss": Operation(
        inputs=lambda case, generator: draw.biased(draw.pairs(case, generator)),
        library=_library_sigmoid,
        formula=_siglip(eager.siglip_loss),
        flops=costs.sigmoid_flops,
        elements=costs.loss_elements(2),
        terms=_features,
        baselines={
            "open_clip": _siglip(eager.siglip_loss),
            "softplus": _siglip(eager.softplus_loss),
        },
        compiled=("open_clip", "softplus"),
    ),
    "himo_loss": Operation(
        inputs=lambda case, generator: draw.scaled(draw.pairs(case, generator)),
        library=_library_head,
        formula=_head(eager.hide_svd),
        flops=costs.head_flops,
        elements=costs.loss_elements(2),
        terms=_longest,
        baselines={"released": _released_head, "eager": _head(eager.hide_eigh)},
        compiled=("released", "eager"),
        rank=lambda inputs, case: _rank_of(inputs["text_features"], _head_tau(case)),
    ),
}
