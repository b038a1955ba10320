"""The parts of a trainer's state, and how tensors and JSON values are told apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gardo.checkpointing.checkpoint import TrainingState
from gardo.checkpointing.state_tensors import sharded_like

_ADAM = frozenset(("step", "exp_avg", "exp_avg_sq"))
"""What Adam and AdamW keep of each parameter."""


class Stateful(Protocol):
    """Something that the epochs to come depend on.

    Its state is a mapping of names to tensors, which may be live and sharded, or a JSON value.
    """

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass(frozen=True)
class Part:
    """The state of an object that has other methods for it, or several states."""

    state_dict: Callable[[], Any]
    load_state_dict: Callable[[Any], None]


@dataclass(frozen=True)
class Counter:
    """A whole number that an object keeps as an attribute."""

    owner: object
    name: str

    def state_dict(self) -> int:
        return int(getattr(self.owner, self.name))

    def load_state_dict(self, state: Any) -> None:
        setattr(self.owner, self.name, int(state))


def separate(
    parts: Mapping[str, Stateful],
) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
    """The states of all parts by name: those that are tensors (or empty), and the JSON values."""
    tensors, values = {}, {}
    for name, part in parts.items():
        state = part.state_dict()
        if isinstance(state, Mapping) and all(isinstance(v, Tensor) for v in state.values()):
            tensors[name] = state
        else:
            values[name] = state
    return tensors, values


def restore(parts: Mapping[str, Stateful], state: TrainingState) -> None:
    """Give all parts their states back. ValueError, KeyError or TypeError if one does not fit."""
    tensors, _ = separate(parts)
    state.check_groups(tensors)
    for name, part in parts.items():
        part.load_state_dict(state.tensors[name] if name in tensors else state.value(name))


class NamedOptimizer:
    """An optimizer's state as ``<parameter>/<key>`` -> tensor."""

    def __init__(self, optimizer: Any, names: Sequence[str]) -> None:
        """``names`` are of the parameters, in their order.

        Args:
            optimizer: torch's Adam or AdamW, or accelerate's wrapper of one.
        """
        self.optimizer, self.names = optimizer, names

    def state_dict(self) -> dict[str, Tensor]:
        """The live tensors; parameters without a state are left out."""
        return {
            f"{self.names[index]}/{key}": value
            for index, entries in self.optimizer.state_dict()["state"].items()
            for key, value in entries.items()
        }

    def load_state_dict(self, packed: Mapping[str, Tensor]) -> None:
        """Load whole tensors; learning rates and the like stay as they are.

        Raises:
            ValueError: tensors of unknown parameters or of a wrong shape, or some are missing.
        """
        optimizer, names = self.optimizer, self.names
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
                f"optimizer: expected {', '.join(sorted(_ADAM))} for each of {len(names)} "
                f"parameters, got {len(packed)} tensors for {len(state)} parameters"
            )
        if state and not all(torch.is_floating_point(t) for t in packed.values()):
            raise ValueError("optimizer: expected floating point tensors")
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
