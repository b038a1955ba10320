"""What a checkpoint holds of tensors: copies on the host, and an optimizer's state by name.

Tensors may be sharded (FSDP2's DTensor). A checkpoint has whole ones, so that it does not depend on
how many processes there are; functions that gather are called by all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_ADAM = frozenset(("step", "exp_avg", "exp_avg_sq"))
"""What Adam and AdamW keep of each parameter."""


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


def pack_optimizer(optimizer: Any, names: Sequence[str], keep: bool = True) -> dict[str, Tensor]:
    """The optimizer's state as ``<parameter>/<key>`` -> tensor, copied to the host.

    Args:
        optimizer: torch's Adam or AdamW, or accelerate's wrapper of one.
        names: of its parameters, in their order. Parameters without a state are left out.
        keep: as in `to_host`.
    """
    state = optimizer.state_dict()["state"]
    named = {
        f"{names[index]}/{key}": value
        for index, entries in state.items()
        for key, value in entries.items()
    }
    return to_host(named, keep)


def unpack_optimizer(optimizer: Any, names: Sequence[str], packed: Mapping[str, Tensor]) -> None:
    """Load what `pack_optimizer` returned; learning rates and the like stay as they are.

    Raises:
        ValueError: tensors of unknown parameters or of a wrong shape, or some are missing.
    """
    position = {name: index for index, name in enumerate(names)}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in packed.items():
        parameter, _, key = name.rpartition("/")
        if parameter not in position:
            raise ValueError(f"optimizer: '{name}': no such parameter")
        index = position[parameter]
        if value.ndim:
            if value.shape != parameters[index].shape:
                raise ValueError(
                    f"optimizer: '{name}': expected shape {tuple(parameters[index].shape)}, "
                    f"got {tuple(value.shape)}"
                )
            value = sharded_like(value, parameters[index])
        state.setdefault(index, {})[key] = value
    keys = {frozenset(entries) for entries in state.values()}
    if state and (len(state) != len(names) or keys != {_ADAM}):
        raise ValueError(
            f"optimizer: expected {', '.join(sorted(_ADAM))} for each of {len(names)} parameters, "
            f"got {len(packed)} tensors for {len(state)} parameters"
        )
    if state and not all(torch.is_floating_point(t) for t in packed.values()):
        raise ValueError("optimizer: expected floating point tensors")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
