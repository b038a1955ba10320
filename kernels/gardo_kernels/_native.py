"""Loads the compiled C++ core and gives its functions tensor signatures.

The core knows neither torch nor Python objects: it takes addresses and sizes. This module is the
only one that passes them; it checks what memory safety needs (dtype, shape, device, contiguity) and
leaves the meaning of values to the ops that call it.

Latents are contiguous CPU tensors ``[B, ...]`` of the same shape, each float32, float16 or bfloat16
on its own. Row scalars (``a``, ``b``, ...) are float32, 0-d or ``[B]``. Nothing here is
differentiable: the gradients are functions of their own. Every function raises ``TypeError`` for a
wrong dtype, ``ValueError`` for a wrong shape, device or layout, and ``RuntimeError`` without the
core. Results do not depend on the number of threads, nor on the other rows of the batch.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch  # first: the core then shares torch's OpenMP runtime instead of loading its own
from torch import Tensor

_MODULE = "gardo_kernels._C"
ADVANTAGE_NORMS = ("none", "group_std", "global_std")
GATE_MODES = ("paper", "official", "all", "off")
SCOPES = ("batch", "group")
KL_REDUCTIONS = ("gated", "batch")
#: dtypes of latents that the core reads, in the order of its codes; it computes in float32
LATENT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(_MODULE), None
    except ModuleNotFoundError as error:
        if error.name != _MODULE:
            raise
        return None, (
            "the C++ core is not built (installed with GARDO_NO_NATIVE=1, or from a source tree "
            "without `pip install -e .`)"
        )
    except ImportError as error:  # built, but it does not load here, e.g. for an older libstdc++
        return None, f"the C++ core does not load: {error}"


_core, _reason = _load()


def is_available() -> bool:
    """Whether the compiled core is loaded."""
    return _core is not None


def unavailable_reason() -> str | None:
    """Why the compiled core is not loaded; None when it is."""
    return _reason


def has_openmp() -> bool:
    """Whether the core is loaded and was built with OpenMP."""
    return _core is not None and bool(_core.has_openmp)


def _require_core() -> ModuleType:
    if _core is None:
        raise RuntimeError(f"backend 'native' is not available: {_reason}")
    return _core


def _readable(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.device.type != "cpu":
        raise ValueError(f"{name}: expected a CPU tensor, got device {tensor.device}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    return tensor


def _array(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Address of a contiguous CPU array of exactly this dtype and shape; 0 for None."""
    if tensor is None:
        return 0
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    return _readable(name, tensor, shape).data_ptr()


def _latents(name: str, tensor: Tensor | None, like: Tensor) -> tuple[int, int]:
    """Address and dtype code of latents of the shape of ``like``; (0, 0) for None."""
    if tensor is None:
        return 0, 0
    if tensor.dtype not in LATENT_DTYPES:
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}")
    address = _readable(name, tensor, tuple(like.shape)).data_ptr()
    return address, LATENT_DTYPES.index(tensor.dtype)


def _row_scalar(name: str, tensor: Tensor, rows: int) -> tuple[int, int]:
    """Address and stride of a float32 scalar, one for all rows or one per row."""
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name}: expected dtype torch.float32, got {tensor.dtype}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name}: expected a CPU tensor, got device {tensor.device}")
    if tensor.dim() == 0:
        return tensor.data_ptr(), 0
    if tuple(tensor.shape) != (rows,):
        raise ValueError(f"{name}: expected shape [] or [{rows}], got {list(tensor.shape)}")
    return tensor.data_ptr(), tensor.stride(0)


def _extent(like: Tensor) -> dict[str, int]:
    if like.dim() == 0:
        raise ValueError("velocity: expected shape [B, ...], got a 0-d tensor")
    rows = like.shape[0]
    return {
        "rows": rows,
        "row_size": like.numel() // rows if rows else 0,
        "num_threads": torch.get_num_threads(),
    }


def _choice(name: str, value: str, choices: tuple[str, ...]) -> int:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return choices.index(value)


def _float32(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


class NativeShapedRewards(NamedTuple):
    """What :func:`shape_rewards` returns; all on the CPU."""

    advantage: Tensor  # [N] float64
    uncertainty: Tensor  # [N] float64
    gate: Tensor  # [N] bool
    threshold: Tensor  # [] float64
    mean_uncertainty: Tensor  # [] float64


def shape_rewards(
    proxy: Tensor,
    aux: Tensor,
    group_ids: Tensor,
    distance: Tensor | None = None,
    fraction: float = 0.1,
    advantage_norm: str = "none",
    gate: str = "paper",
    scope: str = "batch",
) -> NativeShapedRewards:
    """Advantages, win-rate uncertainties and gate of N samples, in O(K N log N).

    ``proxy`` ``[N]``, ``aux`` ``[K, N]`` and ``distance`` ``[N]`` are float64, ``group_ids`` is
    ``[N]`` int64. A sample with NaN in ``proxy`` or ``aux`` takes no part: advantage 0, uncertainty
    0, not gated, left out of every mean and ranking. The arguments mean what they mean to
    :func:`gardo_kernels.shape_rewards`.
    """
    core = _require_core()
    if proxy.dim() != 1:
        raise ValueError(f"proxy: expected shape [N], got {list(proxy.shape)}")
    if aux.dim() != 2:
        raise ValueError(f"aux: expected shape [K, N], got {list(aux.shape)}")
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction: expected a number in [0, 1], got {fraction}")
    samples, num_aux = proxy.shape[0], aux.shape[0]
    result = NativeShapedRewards(
        torch.empty(samples, dtype=torch.float64),
        torch.empty(samples, dtype=torch.float64),
        torch.empty(samples, dtype=torch.bool),
        torch.empty((), dtype=torch.float64),
        torch.empty((), dtype=torch.float64),
    )
    core.shape_rewards(
        proxy=_array("proxy", proxy, torch.float64, (samples,)),
        aux=_array("aux", aux, torch.float64, (num_aux, samples)),
        group_ids=_array("group_ids", group_ids, torch.int64, (samples,)),
        distance=_array("distance", distance, torch.float64, (samples,)),
        num_samples=samples,
        num_aux=num_aux,
        fraction=fraction,
        advantage_norm=_choice("advantage_norm", advantage_norm, ADVANTAGE_NORMS),
        gate_mode=_choice("gate", gate, GATE_MODES),
        scope=_choice("scope", scope, SCOPES),
        num_threads=torch.get_num_threads(),
        advantage=result.advantage.data_ptr(),
        uncertainty=result.uncertainty.data_ptr(),
        gate=result.gate.data_ptr(),
        threshold=result.threshold.data_ptr(),
        mean_uncertainty=result.mean_uncertainty.data_ptr(),
    )
    return result


def win_rate(rewards: Tensor, group_ids: Tensor | None = None) -> Tensor:
    """Share of the others that each sample beats, a tie counting one half, ``[K, N]`` float64.

    ``rewards`` is ``[K, N]`` float64, ``group_ids`` ``[N]`` int64 (None: one group). NaN stays NaN
    and is no one's rival; a sample without others has 0.5.
    """
    core = _require_core()
    if rewards.dim() != 2:
        raise ValueError(f"rewards: expected shape [K, N], got {list(rewards.shape)}")
    num_rewards, samples = rewards.shape
    rate = torch.empty_like(rewards)
    core.win_rate(
        rewards=_array("rewards", rewards, torch.float64, (num_rewards, samples)),
        group_ids=_array("group_ids", group_ids, torch.int64, (samples,)),
        num_rewards=num_rewards,
        num_samples=samples,
        num_threads=torch.get_num_threads(),
        rate=rate.data_ptr(),
    )
    return rate


def nearest_neighbor_distance(features: Tensor, group_ids: Tensor) -> Tensor:
    """Cosine distance to the nearest other member of the group, ``[N]`` float32 in ``[0, 2]``.

    ``features`` ``[N, D]`` float32, float16 or bfloat16 of any length, ``group_ids`` ``[N]`` int64.
    0 for a sample without another usable member, NaN for a row that is not finite (it is no one's
    neighbour), distance 1 from and to a zero row, exactly 0 between identical rows.
    """
    core = _require_core()
    if features.dim() != 2:
        raise ValueError(f"features: expected shape [N, D], got {list(features.shape)}")
    samples, dim = features.shape
    distance = _float32(samples)
    core.nearest_neighbor(
        features=_latents("features", features, features),
        group_ids=_array("group_ids", group_ids, torch.int64, (samples,)),
        num_samples=samples,
        dim=dim,
        num_threads=torch.get_num_threads(),
        distance=distance.data_ptr(),
    )
    return distance


def _policy(
    velocity: Tensor, velocity_uncond: Tensor | None, guidance_scale: float
) -> dict[str, Any]:
    return {
        **_extent(velocity),
        "velocity": _latents("velocity", velocity, velocity),
        "velocity_uncond": _latents("velocity_uncond", velocity_uncond, velocity),
        "guidance_scale": guidance_scale,
    }


def _row_scalars(rows: int, **tensors: Tensor) -> dict[str, tuple[int, int]]:
    return {name: _row_scalar(name, tensor, rows) for name, tensor in tensors.items()}


class NativeStep(NamedTuple):
    """What :func:`sde_step` returns, float32."""

    prev_sample: Tensor  # [B, ...]
    log_prob: Tensor  # [B]
    mean: Tensor | None  # [B, ...]


def sde_step(
    velocity: Tensor,
    sample: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    scale: Tensor,
    offset: Tensor,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    want_mean: bool = True,
) -> NativeStep:
    """``mean = a*x + b*v``, ``prev = mean + c*z`` and its log-probability, in one pass.

    ``z`` is ``noise``, or drawn from ``seed`` (one-element int64 tensor; the layout of
    ``ops/sde/philox.py``), or 0 without either. With ``velocity_uncond`` the velocity is
    ``u + guidance_scale * (v - u)``. ``want_mean=False`` saves writing the mean.
    """
    core = _require_core()
    rows = _extent(velocity)["rows"]
    if noise is not None and seed is not None:
        raise ValueError("seed: expected None when noise is given, got both")
    prev_sample, log_prob = _float32(*velocity.shape), _float32(rows)
    mean = _float32(*velocity.shape) if want_mean else None
    core.sde_step(
        **_policy(velocity, velocity_uncond, guidance_scale),
        **_row_scalars(rows, a=a, b=b, c=c, scale=scale, offset=offset),
        sample=_latents("sample", sample, velocity),
        noise=_latents("noise", noise, velocity),
        seed=0 if seed is None else _array("seed", seed.reshape(-1), torch.int64, (1,)),
        prev_sample=prev_sample.data_ptr(),
        mean=0 if mean is None else mean.data_ptr(),
        log_prob=log_prob.data_ptr(),
    )
    return NativeStep(prev_sample, log_prob, mean)


def sde_log_prob(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    offset: Tensor,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Log-probability ``[B]`` float32: the bits of :func:`sde_step` for the same velocity.

    Backward: :func:`affine_backward` with ``alpha = grad * 2 * scale * b / row_size``.
    """
    core = _require_core()
    log_prob = _float32(_extent(velocity)["rows"])
    core.sde_log_prob(
        **_policy(velocity, velocity_uncond, guidance_scale),
        **_row_scalars(velocity.shape[0], a=a, b=b, scale=scale, offset=offset),
        sample=_latents("sample", sample, velocity),
        prev_sample=_latents("prev_sample", prev_sample, velocity),
        log_prob=log_prob.data_ptr(),
    )
    return log_prob


def affine_backward(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    beta: Tensor | None = None,
    ref_velocity: Tensor | None = None,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """``alpha*(prev - a*x - b*v) + beta*(v - v_ref)`` per row, by the chain rule of the guidance.

    ``alpha`` and ``beta`` are ``[B]`` float32; rows with ``beta`` 0 do not read ``ref_velocity``.
    Returns the gradients of ``velocity`` and ``velocity_uncond`` (None without), in their dtypes.
    """
    core = _require_core()
    rows = _extent(velocity)["rows"]
    if beta is not None and ref_velocity is None:
        raise ValueError("ref_velocity: expected a tensor when beta is given, got None")
    grad = torch.empty_like(velocity)
    grad_uncond = None if velocity_uncond is None else torch.empty_like(velocity_uncond)
    core.affine_backward(
        **_policy(velocity, velocity_uncond, guidance_scale),
        **_row_scalars(rows, a=a, b=b),
        sample=_latents("sample", sample, velocity),
        prev_sample=_latents("prev_sample", prev_sample, velocity),
        ref_velocity=_latents("ref_velocity", ref_velocity, velocity),
        alpha=_array("alpha", alpha, torch.float32, (rows,)),
        beta=_array("beta", beta, torch.float32, (rows,)),
        grad_velocity=_latents("grad_velocity", grad, velocity),
        grad_velocity_uncond=_latents("grad_velocity_uncond", grad_uncond, velocity),
    )
    return grad, grad_uncond


class NativeGRPOLoss(NamedTuple):
    """What :func:`grpo_loss` returns, float32."""

    loss: Tensor  # []
    policy_loss: Tensor  # []
    kl: Tensor  # []
    clip_fraction: Tensor  # []
    log_prob: Tensor  # [B]
    ratio: Tensor  # [B]
    alpha: Tensor  # [B] for affine_backward, for d loss = 1
    beta: Tensor  # [B]


def grpo_loss(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    offset: Tensor,
    kl_weight: Tensor,
    clip_low: float,
    clip_high: float,
    adv_clip: float = 5.0,
    gate: Tensor | None = None,
    ref_velocity: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_reduction: str = "gated",
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> NativeGRPOLoss:
    """The GRPO loss with gated KL in one pass; the ratio is clamped to ``[clip_low, clip_high]``.

    ``old_log_prob`` and ``advantage`` are ``[B]`` float32, ``gate`` ``[B]`` bool (None: all rows),
    ``kl_weight`` the field ``kl`` of the coefficients. Rows outside the gate do not read
    ``ref_velocity``. Backward: :func:`affine_backward` with ``alpha`` and ``beta`` times the
    gradient of the loss.
    """
    core = _require_core()
    rows = _extent(velocity)["rows"]
    result = NativeGRPOLoss(*(_float32() for _ in range(4)), *(_float32(rows) for _ in range(4)))
    core.grpo_loss(
        **_policy(velocity, velocity_uncond, guidance_scale),
        **_row_scalars(rows, a=a, b=b, scale=scale, offset=offset, kl_weight=kl_weight),
        sample=_latents("sample", sample, velocity),
        prev_sample=_latents("prev_sample", prev_sample, velocity),
        ref_velocity=_latents("ref_velocity", ref_velocity, velocity),
        old_log_prob=_array("old_log_prob", old_log_prob, torch.float32, (rows,)),
        advantage=_array("advantage", advantage, torch.float32, (rows,)),
        gate=_array("gate", gate, torch.bool, (rows,)),
        clip_low=clip_low,
        clip_high=clip_high,
        adv_clip=adv_clip,
        kl_coef=kl_coef,
        kl_reduction=_choice("kl_reduction", kl_reduction, KL_REDUCTIONS),
        **{name: value.data_ptr() for name, value in result._asdict().items()},
    )
    return result


class NativeNFTLoss(NamedTuple):
    """What :func:`nft_loss` returns, float32."""

    loss: Tensor  # []
    policy_loss: Tensor  # []
    kl: Tensor  # []
    grad_positive: Tensor  # [B] for nft_backward, for d loss = 1
    grad_negative: Tensor  # [B]
    grad_kl: Tensor  # [B]


def _nft_tensors(
    velocity: Tensor,
    old_velocity: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    beta: float,
    ref_velocity: Tensor | None,
) -> dict[str, Any]:
    extent = _extent(velocity)
    return {
        **extent,
        "velocity": _latents("velocity", velocity, velocity),
        "old_velocity": _latents("old_velocity", old_velocity, velocity),
        "x0": _latents("x0", x0, velocity),
        "xt": _latents("xt", xt, velocity),
        "ref_velocity": _latents("ref_velocity", ref_velocity, velocity),
        "t": _row_scalar("t", t, extent["rows"]),
        "beta": beta,
    }


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    advantage: Tensor,
    beta: float = 1.0,
    adv_clip: float = 5.0,
    gate: Tensor | None = None,
    ref_velocity: Tensor | None = None,
    kl_coef: float = 0.0,
) -> NativeNFTLoss:
    """The DiffusionNFT loss with gated KL in one pass over the latents.

    ``t`` is float32, 0-d or ``[B]``; ``advantage`` ``[B]`` float32; ``gate`` ``[B]`` bool (None:
    all rows; no gated row gives KL 0). Backward: :func:`nft_backward` with the three
    gradients times the gradient of the loss.
    """
    core = _require_core()
    rows = _extent(velocity)["rows"]
    result = NativeNFTLoss(*(_float32() for _ in range(3)), *(_float32(rows) for _ in range(3)))
    core.nft_loss(
        **_nft_tensors(velocity, old_velocity, x0, xt, t, beta, ref_velocity),
        advantage=_array("advantage", advantage, torch.float32, (rows,)),
        gate=_array("gate", gate, torch.bool, (rows,)),
        adv_clip=adv_clip,
        kl_coef=kl_coef,
        **{name: value.data_ptr() for name, value in result._asdict().items()},
    )
    return result


def nft_backward(
    velocity: Tensor,
    old_velocity: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    beta: float,
    grad_positive: Tensor,
    grad_negative: Tensor,
    grad_kl: Tensor,
    ref_velocity: Tensor | None = None,
) -> Tensor:
    """``grad_positive*e+ + grad_negative*e- + grad_kl*(v - v_ref)`` per row, velocity's dtype."""
    core = _require_core()
    rows = _extent(velocity)["rows"]
    grad = torch.empty_like(velocity)
    core.nft_backward(
        **_nft_tensors(velocity, old_velocity, x0, xt, t, beta, ref_velocity),
        grad_positive=_array("grad_positive", grad_positive, torch.float32, (rows,)),
        grad_negative=_array("grad_negative", grad_negative, torch.float32, (rows,)),
        grad_kl=_array("grad_kl", grad_kl, torch.float32, (rows,)),
        grad_velocity=_latents("grad_velocity", grad, velocity),
    )
    return grad
