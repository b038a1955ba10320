"""What a checkpoint holds of tensors: copies on the host, and an optimizer's state by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_ADAM = frozenset(("step", "exp_avg", "exp_avg_sq"))
"""What Adam and AdamW keep of each parameter."""


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors in host memory; those that are there already are not copied again."""
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def pack_optimizer(optimizer: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """The optimizer's state as ``<parameter>/<key>`` -> tensor, copied to the host.

    Args:
        optimizer: torch's Adam or AdamW, or accelerate's wrapper of one.
        names: of its parameters, in their order. Parameters without a state are left out.
    """
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}/{key}": value.detach().to("cpu", copy=True).contiguous()
        for index, entries in state.items()
        for key, value in entries.items()
    }


def unpack_optimizer(optimizer: Any, names: Sequence[str], packed: Mapping[str, Tensor]) -> None:
    """Load what `pack_optimizer` returned; learning rates and the like stay as they are.

    Raises:
        ValueError: tensors of unknown parameters or of a wrong shape, or some are missing.
    """
    position = {name: index for index, name in enumerate(names)}
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in packed.items():
        parameter, _, key = name.rpartition("/")
        if parameter not in position:
            raise ValueError(f"optimizer: '{name}': no such parameter")
        index = position[parameter]
        if value.ndim and value.shape != shapes[index]:
            raise ValueError(
                f"optimizer: '{name}': expected shape {tuple(shapes[index])}, "
                f"got {tuple(value.shape)}"
            )
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
