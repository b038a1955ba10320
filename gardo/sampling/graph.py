"""Whole trajectories as CUDA graphs: one launch replaces some thousand."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from gardo.models.adapters import Adapters
from gardo.models.base import FlowModel
from gardo.sampling.trajectory import Trajectory, inputs, like, sample_trajectory
from gardo.types import UserError


@dataclass(frozen=True)
class _Captured:
    graph: Any  # torch.cuda.CUDAGraph
    buffers: Trajectory
    rows: int  # transformer rows of a replay


class GraphedTrajectories:
    """Captures a trajectory at the first batch of a shape and replays it afterwards.

    Noise, prompts, schedule and initial latents are copied into the graph's own buffers before a
    replay, and weights are read where they are, so neither new noise nor an optimizer step asks
    for another capture. All graphs share one memory pool: only one of them runs at a time. Results
    are bitwise those of `sample_trajectory`.
    """

    def __init__(self, adapters: Adapters | None = None) -> None:
        """``adapters`` tell whose weights are active: each has graphs of its own."""
        self.adapters = adapters
        self._captured: dict[Hashable, _Captured] = {}
        self._pool: Any = None

    @property
    def captures(self) -> int:
        """How many graphs were captured so far."""
        return len(self._captured)

    def run(self, model: FlowModel, trajectory: Trajectory, guidance_scale: float) -> None:
        """As `sample_trajectory`."""
        active = None if self.adapters is None else self.adapters.active
        key = (_signature(trajectory), guidance_scale, active, id(model.module))
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(model, trajectory, guidance_scale)
        else:
            model.rows += captured.rows
        copy_inputs(trajectory, captured.buffers)
        captured.graph.replay()
        trajectory.latents[1:].copy_(captured.buffers.latents[1:])
        trajectory.log_prob.copy_(captured.buffers.log_prob)

    @torch.inference_mode(False)  # what is made in inference mode cannot be written outside of it
    @torch.no_grad()
    def _capture(
        self, model: FlowModel, trajectory: Trajectory, guidance_scale: float
    ) -> _Captured:
        buffers, rows = like(trajectory), model.rows
        graph = self._record(
            lambda: sample_trajectory(model, buffers, guidance_scale), model.device
        )
        per_replay = (model.rows - rows) // self.runs_to_record
        model.rows = rows + per_replay
        return _Captured(graph, buffers, per_replay)

    #: how often recording runs the function: once to warm up, once to capture
    runs_to_record = 2

    def _record(self, function: Callable[[], None], device: torch.device) -> Any:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # libraries initialise and kernels compile before the capture
            function()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # rewards may be computed by another thread meanwhile, which must not disturb
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            function()
        return graph


def copy_inputs(source: Trajectory, target: Trajectory) -> None:
    """Copy everything that a trajectory reads into the buffers of another of the same shapes.

    Raises:
        ValueError: a tensor is missing or differs in shape, dtype or device; the target is then
            unchanged.
    """
    new, static = inputs(source), inputs(target)
    if new.keys() != static.keys():
        raise ValueError(f"trajectory: expected inputs {sorted(static)}, got {sorted(new)}")
    for name, tensor in static.items():
        wanted, got = _kind(tensor), _kind(new[name])
        if wanted != got:
            raise ValueError(f"{name}: expected {wanted}, got {got}")
    for name, tensor in static.items():
        tensor.copy_(new[name])


def use_graphs(mode: str, device: torch.device, sharded: bool = False) -> bool:
    """Whether ``sampling.cuda_graph`` asks for graphs here; ``auto``: on a GPU with whole weights.

    Raises:
        UserError: ``on`` without a GPU, or with sharded weights.
    """
    if mode == "on" and sharded:
        raise UserError(
            "sampling.cuda_graph: 'on' needs whole weights on each GPU, and FSDP brings them "
            "together in every forward; use auto or off"
        )
    if mode == "on" and device.type != "cuda":
        raise UserError(
            f"sampling.cuda_graph: 'on' needs a CUDA device, and this run is on {device.type}; "
            "use auto or off"
        )
    return mode != "off" and device.type == "cuda" and not sharded


def _kind(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _signature(trajectory: Trajectory) -> Hashable:
    tensors = inputs(trajectory).items()
    return (
        trajectory.steps.table.kind,
        tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors),
    )
