"""The keys of ``algorithm`` that are off by default, all on: for runs that combine them."""

from __future__ import annotations

EVERYTHING = {
    "algorithm.reward_scale": "auto",
    "algorithm.cap": "on",
    "algorithm.diversity": "supported",
    "algorithm.gate.anchor": "base",
    "algorithm.gate.share_of": "all",
    "algorithm.gate.fraction": "0.2",
    "algorithm.kl_coef": "{target_share: 0.3}",
    "algorithm.reference.reset_every": "0",
    "algorithm.reference.kl_threshold": "0",
    "algorithm.reference.reset_steps": "3",
}
ALGORITHMS = {
    "grpo": EVERYTHING,
    "nft": {**EVERYTHING, "algorithm.name": "nft", "sampling.same_latent": "false"},
}
