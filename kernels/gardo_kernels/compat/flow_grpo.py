"""Drop-ins for Flow-GRPO (https://github.com/yifan123/flow_grpo): its signatures and returns."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gardo_kernels import checks
from gardo_kernels.ops.group_advantages import group_advantages
from gardo_kernels.ops.nearest_neighbor import nearest_neighbor_distance
from gardo_kernels.ops.sde import SDECoefficients, sde_coefficients, sde_log_prob, sde_step
from gardo_kernels.ops.sde.reference import transition_mean

__all__ = ["PerPromptStatTracker", "sde_step_with_logprob"]

_KIND_OF = {"sde": "flow", "cps": "cps"}
_TYPES = ("grpo", "gardo", "rwr", "sft", "dpo")
_HAS_NUMPY = importlib.util.find_spec("numpy") is not None


class FlowScheduler(Protocol):
    """What is used of a ``FlowMatchEulerDiscreteScheduler``."""

    sigmas: Tensor

    def index_for_timestep(self, timestep: Any) -> int:
        """Position of ``timestep`` in the schedule."""
        ...


def sde_step_with_logprob(
    scheduler: FlowScheduler,
    model_output: Tensor,
    timestep: float | Tensor | Sequence[Any],
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
) -> tuple[Tensor, ...]:
    """One SDE step, or the log-probability of a stored ``prev_sample``.

    Args:
        scheduler: has ``sigmas`` and ``index_for_timestep``.
        model_output, sample: ``[B, ...]``; computed in float32.
        timestep: a value of the schedule: a number, 0-d, or one per sample (``[B]`` or a list).
        noise_level: eta.
        prev_sample: ``[B, ...]`` latents to evaluate; None draws them.
        generator: for the noise; one, or one per sample.
        sde_type: ``sde`` (Flow-GRPO) or ``cps`` (Flow-CPS).
        return_sqrt_dt: also return ``sqrt(-dt)``.

    Returns:
        ``(prev_sample, log_prob, prev_sample_mean, std_dev_t[, sqrt_dt])``: float32; ``log_prob``
        is ``[B]``, the last two are ``[B, 1, ...]`` (``[1, 1, ...]`` for one timestep).
        ``log_prob`` and ``prev_sample_mean`` are differentiable in ``model_output``.

    Raises ``TypeError``/``ValueError`` as ``sde_coefficients`` and ``sde_step``.
    """
    checks.choice("sde_type", sde_type, tuple(_KIND_OF))
    checks.latents("model_output", model_output)
    velocity, current = model_output.float(), sample.float()
    index = _step_indices(scheduler, timestep)
    sigmas = scheduler.sigmas.detach().cpu()
    step = [i + 1 for i in index]
    coef = sde_coefficients(
        sigmas[index], sigmas[step], noise_level, _KIND_OF[sde_type], sigma_max=sigmas[1]
    )
    if len(index) not in (1, len(velocity)):
        raise ValueError(f"timestep: expected 1 or {len(velocity)} values, got {len(index)}")
    coef = (coef[0] if len(index) == 1 else coef).to(velocity.device)
    if prev_sample is None:
        noise = _noise(velocity, generator)
        prev, log_prob, mean = sde_step(velocity, current, coef, noise=noise)
        if velocity.requires_grad:
            log_prob, mean = _differentiable(velocity, current, prev, coef)
    else:
        prev = prev_sample.float()
        log_prob, mean = _differentiable(velocity, current, prev, coef)
    column = (len(index), *([1] * (velocity.dim() - 1)))
    std = coef.std.reshape(-1)[: len(index)].view(column)
    if not return_sqrt_dt:
        return prev, log_prob, mean, std
    sqrt_dt = (sigmas[index] - sigmas[step]).sqrt().to(velocity.device).view(column)
    return prev, log_prob, mean, std, sqrt_dt


def _differentiable(
    velocity: Tensor, sample: Tensor, prev: Tensor, coef: SDECoefficients
) -> tuple[Tensor, Tensor]:
    log_prob = sde_log_prob(velocity, sample, prev, coef)
    return log_prob, transition_mean(velocity, sample, coef)


def _step_indices(scheduler: FlowScheduler, timestep: Any) -> list[int]:
    """Positions in the schedule; a batch at one timestep asks the scheduler once."""
    if isinstance(timestep, Tensor):
        values = timestep.reshape(-1).unbind()
        if len(values) > 1 and bool((timestep == timestep.reshape(-1)[0]).all()):
            return [int(scheduler.index_for_timestep(values[0]))] * len(values)
        return [int(scheduler.index_for_timestep(value)) for value in values]
    if isinstance(timestep, (list, tuple)):
        return [int(scheduler.index_for_timestep(value)) for value in timestep]
    return [int(scheduler.index_for_timestep(timestep))]


def _noise(like: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """Standard normal noise, drawn where the generator lives (as diffusers does)."""
    if isinstance(generator, list):
        if len(generator) != len(like):
            raise ValueError(f"generator: expected {len(like)} generators, got {len(generator)}")
        return torch.cat([_noise(row[None], one) for row, one in zip(like, generator, strict=True)])
    device = like.device if generator is None else generator.device
    noise = torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype)
    return noise.to(like.device)


class PerPromptStatTracker:
    """Group statistics per prompt, computed by the fused ops.

    Takes numpy arrays, tensors or lists, and returns numpy arrays as Flow-GRPO does; CPU tensors
    where numpy is not installed.
    """

    def __init__(self, global_std: bool = False) -> None:
        """``global_std``: divide by the standard deviation over all samples, not the prompt's."""
        self.global_std = global_std
        self.stats: dict[Any, Any] = {}
        self.history_prompts: set[int] = set()

    def update(
        self,
        prompts: Sequence[Any],
        rewards: Any,
        dists: Any = None,
        type: str = "grpo",
    ) -> Any:
        """Advantages of one epoch, float64 in the shape of ``rewards``.

        Args:
            prompts: N hashable prompts; equal prompts form a group.
            rewards: ``[N]`` or ``[N, T]`` (one column per timestep).
            dists: ``[N, D]`` image features, for ``type="gardo"``.
            type: ``grpo``: centred over the standard deviation + 1e-4; ``gardo``: centred, times
                the diversity factor where not negative; ``rwr``: the rewards; ``sft``: 1 for the
                best of the group, else 0; ``dpo``: 1 for its best, -1 for its worst, else 0.

        Raises:
            TypeError, ValueError: wrong type, shape or value.
        """
        checks.choice("type", type, _TYPES)
        values = _tensor(rewards).to(torch.float64)
        if values.dim() not in (1, 2) or len(values) != len(prompts):
            raise ValueError(
                f"rewards: expected shape [{len(prompts)}] or [{len(prompts)}, T], "
                f"got {list(values.shape)}"
            )
        names = prompts.tolist() if hasattr(prompts, "tolist") else list(prompts)
        number = {name: position for position, name in enumerate(dict.fromkeys(names))}
        groups = torch.tensor([number[name] for name in names], dtype=torch.int64)
        for name, position in number.items():
            self.stats[name] = _returned(values[groups == position])
            self.history_prompts.add(hash(name))
        columns = values[:, None] if values.dim() == 1 else values
        return _returned(self._advantages(columns, groups, dists, type).view(values.shape))

    def _advantages(self, columns: Tensor, groups: Tensor, dists: Any, type: str) -> Tensor:
        if type == "rwr":
            return columns
        if type in ("sft", "dpo"):
            pick = _best if type == "sft" else _best_and_worst
            return torch.stack([pick(c, groups) for c in columns.unbind(1)], dim=1)
        distance = None
        norm = "global_std" if self.global_std else "group_std"
        if type == "gardo":
            norm = "none"
            if dists is not None:
                distance = nearest_neighbor_distance(_tensor(dists), groups)
        columns = columns.contiguous()
        advantages = [group_advantages(c, groups, distance, norm) for c in columns.unbind(1)]
        return torch.stack(advantages, dim=1)

    def get_stats(self) -> tuple[float, int]:
        """Mean group size, and the number of distinct prompts seen so far."""
        sizes = [len(values) for values in self.stats.values()]
        return (sum(sizes) / len(sizes) if sizes else 0), len(self.history_prompts)

    def clear(self) -> None:
        """Forget the groups; the count of distinct prompts stays."""
        self.stats = {}


def _tensor(values: Any) -> Tensor:
    """A CPU tensor of an array, a tensor, or a list of numbers, arrays or tensors."""
    if isinstance(values, (list, tuple)) and values and not isinstance(values[0], (int, float)):
        return torch.stack([_tensor(value) for value in values])
    return torch.as_tensor(values).detach().cpu()


def _returned(values: Tensor) -> Any:
    return values.numpy() if _HAS_NUMPY else values


def _best(rewards: Tensor, groups: Tensor) -> Tensor:
    """1 for every sample with the best reward of its group, else 0."""
    best = rewards.new_full((int(groups.max()) + 1,), -torch.inf)
    best.scatter_reduce_(0, groups, rewards, "amax")
    return (rewards == best[groups]).to(rewards.dtype)


def _best_and_worst(rewards: Tensor, groups: Tensor) -> Tensor:
    """1 for the first best and -1 for the first worst of each group; a tied group: first two."""
    result = torch.zeros_like(rewards)
    for group in groups.unique():
        members = (groups == group).nonzero().flatten()
        best, worst = int(rewards[members].argmax()), int(rewards[members].argmin())
        if best == worst:
            worst, best = 0, min(1, len(members) - 1)
        result[members[best]] = 1.0
        result[members[worst]] = -1.0
    return result
