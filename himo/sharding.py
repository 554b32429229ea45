"""`himo train --fsdp`: each process holds a part of the weights, their gradients and their moments.

torch's FSDP2 (`fully_shard`) gathers the weights of a block for its forward and its backward, and
leaves each process the mean gradient of its part. Whatever the run writes is put together first, so
its files are the same as without --fsdp.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from himo.layers import ResidualAttentionBlock
from himo.model import HiMoCLIP

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

# fully_shard takes no scalar: while sharded, this parameter has shape [1] instead of [].
_SCALAR = "logit_scale"


def mesh_of_all(device: torch.device) -> "DeviceMesh":
    """All processes, each with its device of this type."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (dist.get_world_size(),))


def shard(towers: nn.Module, mesh: "DeviceMesh | None" = None) -> nn.Module:
    """Shards the parameters of a module that has a HiMoCLIP, in place, over all processes.

    Each residual block is gathered by itself, the other parameters together. All processes begin
    with the weights of rank 0, as with DDP.

    Args:
        mesh: as of `mesh_of_all`, which makes it by default.
    """
    # Imported here, because no other run needs it.
    from torch.distributed.fsdp import fully_shard

    for parameter in towers.parameters():
        dist.broadcast(parameter.detach(), 0)
    for module in towers.modules():
        if isinstance(module, HiMoCLIP):
            scale = module.logit_scale
            module.logit_scale = nn.Parameter(scale.detach().reshape(1), scale.requires_grad)
    mesh = mesh or mesh_of_all(next(towers.parameters()).device)
    blocks = [module for module in towers.modules() if isinstance(module, ResidualAttentionBlock)]
    for module in (*blocks, towers):  # the towers last: they take what no block has
        sharded = fully_shard(module, mesh=mesh)
        if mesh.device_type == "cpu":
            # A mean over gloo was a sum in some versions of torch: pytorch/pytorch#162338.
            sharded.set_force_sum_reduction_for_comms(True)
    return towers


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in the same memory; any other tensor as it is."""
    sharded = _sharded(tensor)
    return tensor if sharded is None else sharded.to_local()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, put together on every rank, which must all call it; any other as it is."""
    sharded = _sharded(tensor)
    return tensor if sharded is None else sharded.full_tensor().detach()


def whole_shape(name: str, tensor: Tensor) -> torch.Size:
    """The shape of a parameter of this name without --fsdp."""
    return torch.Size() if name == _SCALAR else tensor.shape


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this rank has of like, on the device of like."""
    sharded = _sharded(like)
    if sharded is None:
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    of_this_rank = distribute_tensor(
        tensor.to(like.device).reshape(like.shape),
        sharded.device_mesh,
        sharded.placements,
        src_data_rank=None,  # every rank has the whole
    )
    return of_this_rank.clone()  # not a view, which would keep the whole in memory


def gathered(tensors: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """The whole tensors by name, those that were sharded on the CPU. Every rank must call it.

    Args:
        tensors: name, with slashes before the parameter's if it has any, and tensor.
        keep: whether this rank wants them; otherwise it gets none.
    """
    found = {}
    for name, tensor in tensors:
        complete = whole(tensor)
        if not keep:
            continue
        if complete is not tensor:  # one at a time is whole on the GPU
            complete = complete.cpu()
        found[name] = complete.reshape(()) if _SCALAR in name.split("/") else complete
    return found


def whole_model(model: HiMoCLIP, replaced: dict[str, Tensor], *, keep: bool) -> HiMoCLIP | None:
    """A copy of a sharded model with whole weights, on its device. Every rank must call it.

    Args:
        replaced: sharded tensors by name, to take instead of the weights.
        keep: whether this rank wants the copy; otherwise it gets None.
    """
    state = model.state_dict() | replaced
    weights = gathered(state.items(), keep=keep)
    if not keep:
        return None
    with torch.device("meta"):
        copy = HiMoCLIP(model.config)
    copy.load_state_dict(weights, assign=True)
    copy.provenance = model.provenance
    return copy.to(model.logit_scale.device)


def clip_grad_norm_(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ of sharded parameters, with one number for each rank to send.

    Returns:
        The norm of the whole gradient before, the same on all ranks.
    """
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    of_part = nn.utils.get_total_norm(grads)
    square = of_part.double().square()  # float32 ends at a norm of 1.8e19
    dist.all_reduce(square)
    norm = square.sqrt().to(of_part.dtype)
    torch._foreach_mul_(grads, torch.clamp(limit / (norm + 1e-6), max=1.0))
    return norm


def _sharded(tensor: Any) -> "DTensor | None":
    # By its method: the class is not imported without --fsdp.
    return tensor if hasattr(tensor, "full_tensor") else None
