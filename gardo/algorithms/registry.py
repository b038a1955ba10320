"""The algorithms by the name that ``algorithm.name`` gives them."""

from __future__ import annotations

from gardo.algorithms.grpo import GRPO
from gardo.algorithms.nft import NFT
from gardo.algorithms.update import Algorithm

ALGORITHMS: dict[str, type[Algorithm]] = {
    "grpo": GRPO,
    "nft": NFT,
}
