"""Whole tensors of sharded ones and back, and copies on the host.

Tensors may be sharded (FSDP2's DTensor). A checkpoint has whole ones, so that it does not depend on
how many processes there are; functions that gather are called by all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def whole(tensor: Any) -> Tensor:
    """The tensor, brought together from all processes if it is sharded; they all call this."""
    gather = getattr(tensor, "full_tensor", None)  # importing DTensor takes long
    return tensor if gather is None else gather()


def sharded_like(tensor: Tensor, like: Any) -> Tensor:
    """This process's part of a whole tensor, if ``like`` is sharded; talks to nobody."""
    if not hasattr(like, "full_tensor") or hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    device = like.to_local().device
    return distribute_tensor(
        tensor.to(device), like.device_mesh, like.placements, src_data_rank=None
    )


def to_host(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Contiguous copies in host memory of whole tensors, one after the other.

    Args:
        keep: whether this process wants them; one that does not still takes part in gathering.
    """
    copies = {}
    for name in sorted(tensors):  # gathering needs one order, and a file read has a random one
        complete = whole(tensors[name].detach())
        if keep:
            copies[name] = complete.to("cpu", copy=True).contiguous()
    return copies
