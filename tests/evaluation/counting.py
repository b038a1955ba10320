"""Rewards that remember how often they were asked."""

from __future__ import annotations

import torch

from gardo.rewards.base import Reward, RewardSpec
from gardo.types import RewardOutput

calls: list[int] = []
fail_next = False


def reward(images, prompts, metadata):
    """1 for each image."""
    calls.append(len(images))
    return torch.ones(len(images))


def sometimes(images, prompts, metadata):
    """1 for each image, but for the first one after `fail_next` was set."""
    global fail_next
    scores = torch.ones(len(images))
    if fail_next:
        scores[0], fail_next = torch.nan, False
    return scores


class Remote(Reward):
    """1 for each image, as a server would say."""

    spec = RewardSpec(remote=True)

    def __init__(self, device="cpu"):
        pass

    def score(self, images, prompts, metadata):
        calls.append(len(images))
        return RewardOutput(torch.ones(len(images)))
