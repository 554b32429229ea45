"""The memory of one training step, counted by running it on tensors without data.

The trainer's own model, objective and optimizer run under torch's FakeTensorMode: operations
return shapes and allocate nothing. As in a caching allocator, a storage counts once however many
tensors view it, from the operation that makes it until nothing refers to it. So the peak is counted
and comes from no formula.
"""

import copy
import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from himo import sharding
from himo.average import AverageWeights
from himo.config import TrainConfig
from himo.model import HiMoCLIP
from himo.objective import Objective
from himo.optimizer import make_optimizer
from himo.parallel import Ranks
from himo.run import build_model
from himo_kernels.dispatch import OPERATORS

# The uses of memory, in the order shown.
PARAMETERS, GRADIENTS, STATE = "parameters", "gradients", "optimizer state"
AVERAGE = "average of the weights"
BUCKETS, BATCH = "DDP's gradient buckets", "images and tokens"
GATHERED, WHOLE = "gathered by FSDP", "whole weights"
IMAGE, TEXT, LOSS, EXCHANGE = "image tower", "text tower", "loss and HiDe", "exchange"
BACKWARD, UPDATE = "in passing, backward", "in passing, optimizer"
KINDS = (
    *(PARAMETERS, GRADIENTS, STATE, AVERAGE, BUCKETS, GATHERED, WHOLE, BATCH),
    *(IMAGE, TEXT, LOSS, EXCHANGE, BACKWARD, UPDATE),
)
SAVING = "saving"  # a phase, at the end of an epoch


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes in use at the peak of a step, by use, and the phase of the step at the peak."""

    parts: dict[str, int]
    phase: str

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Ledger(TorchDispatchMode):
    """Counts the storages of all tensors made while it is active, and records the highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = Memory({}, "")
        self._alive: Counter[str] = Counter()
        self._total = self._highest = 0
        self._owners: dict[int, tuple[str, int]] = {}  # by storage: kind, bytes
        self._kind = PARAMETERS

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Counts storages that the body makes as this kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def during(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function; storages that it makes are counted as this kind."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.making(kind):
                return function(*args, **kwargs)

        return run

    def become(self, kind: str) -> Callable[[Tensor], None]:
        """A hook of a tensor: storages made after its gradient are counted as this kind."""

        def hook(grad: Tensor) -> None:
            self._kind = kind

        return hook

    def claim(self, tensors: Iterable[Any], kind: str) -> None:
        """Counts existing tensors as this kind instead."""
        for key in {tensor.untyped_storage()._cdata for tensor in tensors} & self._owners.keys():
            before, size = self._owners[key]
            self._owners[key] = kind, size
            self._alive[before] -= size
            self._alive[kind] += size

    def forget_peak(self) -> None:
        """Starts again: the peak is the memory in use now."""
        self._highest = 0
        self._keep_peak()

    @contextmanager
    def resizes(self) -> Iterator[None]:
        """Follows storages that change their size in the body, as FSDP's do: no operation tells."""
        # As torch/distributed/_tools/mem_tracker.py does.
        resize = torch.UntypedStorage.resize_

        def followed(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            self._resized(storage._cdata, size)

        torch.UntypedStorage.resize_ = followed  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(hasattr(type_, "full_tensor") for type_ in types):
            return NotImplemented  # sharded: comes again with this rank's parts
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # for every number that the host reads: of a token, of a step
        if func.namespace == "himo_kernels":
            # Runs its body: its fake does not tell the memory inside.
            name, _, direction = func._opname.rpartition("_")
            with self:
                return OPERATORS[name].run(direction, *args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            if tensor.device.type != "meta":
                self._count(tensor.untyped_storage())
        if func.namespace in ("c10d", "fsdp"):
            self._claim_passed(func.namespace, _tensors((args, kwargs)))
        return out

    def _claim_passed(self, namespace: str, tensors: list[Tensor]) -> None:
        # FSDP copies parts to a buffer, which it gathers, and the mean of gradients to a new part.
        kinds = [self._kind_of(tensor) for tensor in tensors]
        kind = EXCHANGE
        if namespace == "fsdp":
            kind = GATHERED
        elif GATHERED in kinds:
            kind = GRADIENTS
        kept = (PARAMETERS, GATHERED)
        self.claim([t for t, of in zip(tensors, kinds, strict=True) if of not in kept], kind)

    def _kind_of(self, tensor: Tensor) -> str:
        return self._owners.get(tensor.untyped_storage()._cdata, ("", 0))[0]

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._owners:
            return
        self._owners[key] = self._kind, 0
        weakref.finalize(storage, self._release, key)
        self._resized(key, storage.nbytes())

    def _resized(self, key: int, size: int) -> None:
        if key not in self._owners:
            return
        kind, before = self._owners[key]
        self._owners[key] = kind, size
        self._alive[kind] += size - before
        self._total += size - before
        self._keep_peak()

    def _keep_peak(self) -> None:
        if self._total > self._highest:
            self._highest = self._total
            self.peak = Memory({k: n for k, n in self._alive.items() if n}, self._kind)

    def _release(self, key: int) -> None:
        self._resized(key, 0)
        del self._owners[key]


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class _OneOfMany(Ranks):
    """Process 0 of `size`; the others do not exist."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._mesh: Any = None

    def open(self) -> None:
        """Makes what FSDP needs, which takes tensors with data."""
        self._mesh = sharding.mesh_of_all(torch.device("cpu"))

    def wrap(self, module: nn.Module, *, sharded: bool = False) -> nn.Module:
        return sharding.shard(module, self._mesh) if sharded else module


class Rehearsal:
    """Steps of a training run, any number of them, each with its own settings.

    Counts AdamW on all tensors at once (the trainer's fused one stores no temporary tensors), the
    operators' reference backend, and fused attention, which stores no scores [L, L]. Every caption
    has the context's length. With several processes DistributedDataParallel adds gradient buckets
    as large as the gradients. With FSDP this is the process that saves, which then has the whole
    weights too. Validation is not counted.

    Args:
        settings: of the run; data, device and files do not matter.
        ranks: processes of the run.

    Raises:
        HimoError: as `himo.run.build_model`.
    """

    def __init__(self, settings: TrainConfig, ranks: int = 1) -> None:
        self.settings, self._size = settings, ranks
        # A new model gets no values; a checkpoint's are read and then freed.
        with torch.device("meta") if settings.pretrained is None else nullcontext():
            self._model = build_model(settings, torch.device("meta"))
        self._unsharded: _Process | None = None

    @property
    def fixed(self) -> int:
        """Bytes of the optimizer's step without a batch."""
        with _group_of(self._size):
            return self._process(self.settings).update.total

    def step(self, **changes: Any) -> Memory:
        """The memory at the peak of a step; `changes` of settings that leave the model as it is."""
        # "skip": tensors without data cannot tell whether a loss is finite.
        settings = dataclasses.replace(self.settings, on_nonfinite="skip", **changes)
        with _group_of(self._size):
            return self._process(settings).step(settings)

    def _process(self, settings: TrainConfig) -> "_Process":
        if settings.fsdp:  # a model is sharded once, over a group that ends with this step
            return _Process(self._model, settings, self._size)
        if self._unsharded is None:
            self._unsharded = _Process(self._model, settings, self._size)
        return self._unsharded


class _Process:
    """The model and optimizer of a process, without data.

    Attributes:
        update: the memory of the optimizer's step without a batch.
    """

    def __init__(self, model: HiMoCLIP, settings: TrainConfig, size: int) -> None:
        self._ranks = _OneOfMany(size)
        self._fake, self._ledger = FakeTensorMode(allow_non_fake_inputs=True), Ledger()
        self._model = copy.deepcopy(model)
        self._saving = Memory({}, SAVING)
        if settings.fsdp:
            self._ranks.open()
        with self._counting():
            self._model.to_empty(device="cpu")
            # This shards the model, which the optimizer must find sharded.
            self._objective = self._new_objective(settings) if settings.fsdp else None
            self._prepare(settings)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        with self._ledger.resizes(), self._fake, self._ledger:
            yield

    def _new_objective(self, settings: TrainConfig) -> Objective:
        return Objective(self._model, settings, self._ranks, backend="reference", check_ranks=False)

    def step(self, settings: TrainConfig) -> Memory:
        """As `Rehearsal.step`."""
        ledger, model = self._ledger, self._model
        rows, parts = settings.batch_size * settings.accum_freq, settings.accum_freq
        side, length = model.visual.input_resolution, model.context_length
        model.set_grad_checkpointing(settings.grad_checkpointing)
        with self._counting():
            with ledger.making(BATCH):
                images = torch.empty(rows, 3, side, side, dtype=torch.uint8)
                tokens = torch.empty(rows, length, dtype=torch.int32)
            objective = self._objective or self._new_objective(settings)
            towers = _first_and_last(objective.towers.forward, parts, model.config.embed_dim)
            _replace(objective.towers, "forward", ledger.during(IMAGE, towers))
            _replace(objective, "losses", self._with_its_backward(objective.losses))
            ledger.forget_peak()
            with ledger.making(BACKWARD):
                objective.backward(images, tokens, length, settings.batch_size)
            peak = ledger.peak
            model.zero_grad(set_to_none=True)
            del objective.towers.forward, objective.losses  # these hold it, and so its tensors
        update = Memory(self.update.parts | {BATCH: images.nbytes + tokens.nbytes}, UPDATE)
        return max(peak, update, self._saving, key=lambda memory: memory.total)

    def _with_its_backward(self, losses: Callable[..., Any]) -> Callable[..., Any]:
        ledger = self._ledger

        def run(image_features: Tensor, text_features: Tensor, scale: Tensor) -> Any:
            for features in (image_features, text_features):
                if features.requires_grad:
                    features.register_hook(ledger.become(BACKWARD))
            with ledger.making(LOSS):
                outputs = losses(image_features, text_features, scale)
            outputs["loss"].register_hook(ledger.become(LOSS))
            return outputs

        return run

    def _prepare(self, settings: TrainConfig) -> None:
        ledger, model = self._ledger, self._model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self._ranks.size > 1 and not settings.fsdp:
            with ledger.making(BUCKETS):
                self._buckets = [torch.empty_like(parameter) for parameter in trained]
        # Not DTensors, whose operations make whole tensors the first time, to learn their shapes.
        held = {parameter: sharding.local(parameter.detach()) for parameter in trained}
        with ledger.making(GRADIENTS):
            for part in held.values():
                part.grad = torch.empty_like(part)
        if settings.ema is not None:
            with ledger.making(AVERAGE):
                self._average = AverageWeights(model, settings.ema)
        optimizer = make_optimizer(model, settings)
        for group in optimizer.param_groups:
            group |= {"foreach": True, "fused": None}
            group["params"] = [held[parameter] for parameter in group["params"]]
        ledger.forget_peak()
        with ledger.making(UPDATE):
            optimizer.step()  # makes its state first, then its temporary tensors
        states = [x for state in optimizer.state.values() for x in state.values()]
        ledger.claim(states, STATE)
        size = sum(state.nbytes for state in states)
        parts = ledger.peak.parts
        self.update = Memory(parts | {STATE: size, UPDATE: parts[UPDATE] - size}, UPDATE)
        self._optimizer = optimizer  # and with it the state
        if settings.fsdp:  # a copy of the model, as `sharding.whole_model` makes
            copied = {WHOLE: sum(p.numel() * p.element_size() for p in model.parameters())}
            self._saving = Memory(parts | {STATE: size, UPDATE: 0} | copied, SAVING)
        optimizer.zero_grad(set_to_none=True)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: ledger.claim([parameter.grad], GRADIENTS)
            )
        _replace(model, "encode_text", ledger.during(TEXT, model.encode_text))


def _first_and_last(forward: Callable[..., Any], parts: int, width: int) -> Callable[..., Any]:
    # Runs the first micro-batch, which makes the gradients, the second, which adds to them, and the
    # last, when most embeddings are in memory. The others take the memory of the second, and time.
    calls = 0

    def run(images: Tensor, tokens: Tensor, max_length: int, lengths: Any = None) -> Any:
        nonlocal calls
        number, calls = calls % parts, calls + 1
        if number < 2 or number == parts - 1:
            return forward(images, tokens, max_length, lengths)
        shapes = ((images.shape[0], width), (images.shape[0], width), ())
        wanted = torch.is_grad_enabled()
        return tuple(torch.empty(shape, requires_grad=wanted) for shape in shapes)

    return run


def _replace(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    setattr(module, name, function)  # of this object alone


@contextmanager
def _group_of(size: int) -> Iterator[None]:
    # torch's process group for tests of one rank of many: its collectives return at once.
    if size == 1:
        yield
        return
    from torch.testing._internal.distributed import fake_pg

    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
