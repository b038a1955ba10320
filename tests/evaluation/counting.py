"""Rewards that remember how often they were asked."""

from __future__ import annotations

import torch

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
