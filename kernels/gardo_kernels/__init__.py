"""Fused kernels for online RL on diffusion and flow models.

Every op takes and gives torch tensors, checks its arguments, and runs on the best backend that is
available (``backend=None``) or on the one named. Needs torch alone.
"""

from gardo_kernels.adaptive import AdaptiveFraction
from gardo_kernels.anchor import Anchor
from gardo_kernels.backends import BackendUnavailable
from gardo_kernels.host_memory import empty_cache
from gardo_kernels.ops.cap_rewards import cap_rewards
from gardo_kernels.ops.gate_samples import GatedSamples, gate_samples
from gardo_kernels.ops.group_advantages import group_advantages
from gardo_kernels.ops.grpo_loss import GRPOLoss, grpo_loss
from gardo_kernels.ops.nearest_neighbor import nearest_neighbor_distance
from gardo_kernels.ops.nft_loss import NFTLoss, nft_loss
from gardo_kernels.ops.sde import (
    SDECoefficients,
    SDEStep,
    sde_coefficients,
    sde_log_prob,
    sde_step,
)
from gardo_kernels.ops.shape_rewards import ShapedRewards, shape_rewards
from gardo_kernels.ops.win_rate import win_rate

__version__ = "0.1.0"

__all__ = [
    "AdaptiveFraction",
    "Anchor",
    "BackendUnavailable",
    "GRPOLoss",
    "GatedSamples",
    "NFTLoss",
    "SDECoefficients",
    "SDEStep",
    "ShapedRewards",
    "__version__",
    "cap_rewards",
    "empty_cache",
    "gate_samples",
    "group_advantages",
    "grpo_loss",
    "nearest_neighbor_distance",
    "nft_loss",
    "sde_coefficients",
    "sde_log_prob",
    "sde_step",
    "shape_rewards",
    "win_rate",
]
