"""A pool of the base policy's samples, by which the samples of an epoch are judged."""

from __future__ import annotations

import torch
from torch import Tensor

from gardo_kernels import checks
from gardo_kernels.ops import cap_rewards as capping
from gardo_kernels.ops import win_rate as winning


class Anchor:
    """Uncertainty, threshold and cap of samples against a fixed pool, not against each other.

    A batch that has drifted away as a whole looks normal to itself, and not to the pool. Everything
    is on the device of the pool and computed in float64; only the construction waits for it.

    Args:
        pool: ``[1 + K, M]`` floating, K at least 1: proxy and auxiliary rewards of M samples of the
            base policy. Samples with a value that is not finite are dropped.

    Raises:
        TypeError, ValueError: wrong type, shape or dtype, or a pool without a valid sample.
    """

    def __init__(self, pool: Tensor) -> None:
        checks.floating("pool", pool)
        if pool.dim() != 2 or pool.shape[0] < 2:
            raise ValueError(
                "pool: expected shape [1 + K, M] with K at least 1 auxiliary reward, "
                f"got {list(pool.shape)}"
            )
        valid = pool.isfinite().all(0)
        #: What was given, without the samples that are not valid.
        self.pool = pool.detach().to(torch.float64)[:, valid].contiguous()
        if self.pool.shape[1] == 0:
            raise ValueError(
                f"pool: expected a sample with finite rewards, got none among {pool.shape[1]}"
            )
        self._sorted = self.pool.sort(dim=-1).values
        wins = winning.win_rate(self.pool)
        #: ``[M]``, the uncertainty of each sample of the pool against the M - 1 others.
        self.pool_uncertainty = wins[0] - wins[1:].mean(0)
        self._ordered = self.pool_uncertainty.sort().values

    def uncertainty(self, proxy: Tensor, aux: Tensor) -> Tensor:
        """How much the proxy over-rates each sample, by the pool, ``[N]`` float64::

            U_i = share of the pool that proxy_i beats
                  - mean_k (share of the pool that aux_k,i beats)      a tie counts one half

        ``proxy`` is ``[N]``, ``aux`` ``[K, N]``, floating. NaN for a sample with a reward that is
        not finite. No gradient flows.
        """
        self._check(proxy, aux)
        rewards = torch.cat([proxy[None].to(torch.float64), aux.to(torch.float64)]).detach()
        below = torch.searchsorted(self._sorted, rewards)
        doubled = below + torch.searchsorted(self._sorted, rewards, right=True)
        # In integers up to the division: agreement is exactly 0.
        gap = (len(self.pool) - 1) * doubled[0] - doubled[1:].sum(0)
        share = gap.to(torch.float64) / (2 * (len(self.pool) - 1) * self.pool.shape[1])
        return torch.where(rewards.isfinite().all(0), share, torch.nan)

    def threshold(self, share: float | Tensor) -> Tensor:
        """What ``share`` of the pool's uncertainties lie above, 0-d: their ``1 - share`` quantile.

        ``share`` is in ``[0, 1]``: a number, or a 0-d floating tensor on the device of the pool,
        whose value is not checked. The quantile is by linear interpolation.
        """
        if not isinstance(share, Tensor):
            return self._quantile(1 - checks.number("share", share, low=0.0, high=1.0))
        return self._quantile(1 - self._scalar("share", share))

    def cap(
        self, proxy: Tensor, aux: Tensor, percentile: float | Tensor, backend: str | None = None
    ) -> Tensor:
        """:func:`cap_rewards` by the pool, with a percentile of its uncertainties as ``tau``.

        ``percentile`` is in ``[0, 100]``: a number, or a tensor as in :meth:`threshold`.
        """
        self._check(proxy, aux)
        if not isinstance(percentile, Tensor):
            q = checks.number("percentile", percentile, low=0.0, high=100.0) / 100
            tau = self._quantile(q)
        else:
            tau = self._quantile(self._scalar("percentile", percentile) / 100)
        return capping.cap_rewards(proxy, aux, self.pool, tau, backend)

    def state_dict(self) -> dict[str, Tensor]:
        """``{"pool": pool}``, from which ``Anchor(state["pool"])`` makes an equal anchor."""
        return {"pool": self.pool}

    def _check(self, proxy: Tensor, aux: Tensor) -> None:
        checks.rewards("proxy", proxy, 1)
        checks.same_device("proxy", proxy, self.pool.device)
        checks.rewards("aux", aux, 2, proxy)
        if aux.shape[0] != len(self.pool) - 1:
            expected = [len(self.pool) - 1, proxy.shape[0]]
            raise ValueError(f"aux: expected shape {expected}, got {list(aux.shape)}")

    def _scalar(self, name: str, value: Tensor) -> Tensor:
        checks.floating(name, value)
        return checks.shaped(name, value, (), self.pool.device).detach().to(torch.float64)

    def _quantile(self, q: float | Tensor) -> Tensor:
        """By linear interpolation; a tensor is read on its device."""
        last = self._ordered.shape[0] - 1
        position = torch.full_like(self._ordered[0], q) if isinstance(q, float) else q
        position = position.clamp(0, 1) * last
        lower = position.nan_to_num().floor().to(torch.int64)
        around = torch.stack([lower, (lower + 1).clamp(max=last)])
        low, high = self._ordered.gather(0, around)
        return low + (high - low) * (position - lower)
