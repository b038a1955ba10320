"""The proxy reward capped at what the auxiliary rewards support, by a pool of the base policy."""

from __future__ import annotations

import torch
from torch import Tensor

from gardo_kernels import backends, checks
from gardo_kernels.operators import operator
from gardo_kernels.ops.cap_rewards import native

__all__ = ["cap_rewards"]

#: Backends by name, best first: the files of this folder.
BACKENDS = backends.discover(__name__, __path__)

_cap_rewards = operator(native.cap_rewards, lambda proxy, *_: torch.empty_like(proxy))


def cap_rewards(
    proxy: Tensor, aux: Tensor, pool: Tensor, tau: float | Tensor, backend: str | None = None
) -> Tensor:
    """A sample may earn from the proxy at most what its auxiliary rewards support::

        level_i  = mean_k (share of the pool that aux_k,i beats, ties one half) + tau
        capped_i = proxy_i                                          where level_i >= 1
                   min(proxy_i, quantile(proxy of the pool, level_i))    elsewhere

    The quantile is by linear interpolation, its level at least 0.

    Args:
        proxy: ``[N]`` floating, the reward being optimised.
        aux: ``[K, N]`` floating, auxiliary rewards, K at least 1.
        pool: ``[1 + K, M]`` floating, proxy and auxiliary rewards of M samples of the base policy
            in any order, M at least 1. A sample with a value that is not finite is left out.
        tau: what a sample may exceed its support by, as a share of the pool: a number, or a 0-d
            floating tensor on the device of the rewards, whose value is not checked.
        backend: None for the best available, or a name.

    Returns:
        ``[N]``, computed in float64; float64 for a float64 proxy, else float32. NaN for a sample
        with a reward that is not finite, and for all where the pool has no valid sample or ``tau``
        is NaN. Powers of two that scale the proxy of samples and pool scale the result, exactly. No
        gradient flows.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype, device or value.
        BackendUnavailable: the backend asked for cannot run here.
    """
    checks.rewards("proxy", proxy, 1)
    checks.rewards("aux", aux, 2, proxy)
    if aux.shape[0] == 0:
        raise ValueError(f"aux: expected at least one reward, got shape {list(aux.shape)}")
    checks.floating("pool", pool)
    rows = 1 + aux.shape[0]
    if pool.dim() != 2 or pool.shape[0] != rows or pool.shape[1] == 0:
        raise ValueError(
            f"pool: expected shape [{rows}, M] with M at least 1, got {list(pool.shape)}"
        )
    checks.same_device("pool", pool, proxy.device)
    number, tensor = 0.0, None
    if isinstance(tau, Tensor):
        checks.floating("tau", tau)
        tensor = checks.shaped("tau", tau, (), proxy.device).to(torch.float64)
    else:
        number = checks.number("tau", tau)
    chosen = backends.select("cap_rewards", backend, proxy.device, proxy.dtype, BACKENDS)
    wide = (proxy.to(torch.float64), aux.to(torch.float64), _sorted(pool.to(torch.float64)))
    capped: Tensor = _cap_rewards(chosen, *wide, number, tensor)
    return capped.to(checks.compute_dtype(proxy))


def _sorted(pool: Tensor) -> Tensor:
    """Each row ascending; samples that are left out become infinities at the end."""
    return torch.where(pool.isfinite().all(0), pool, torch.inf).sort(dim=-1).values
