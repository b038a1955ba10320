"""Run by torchrun in `test_distributed`: shapes the same epoch's scores in several processes.

Usage: torchrun ... shape_in_processes.py OUTPUT
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file

from gardo.algorithms.shaping import Shaper
from gardo.config import load_config
from gardo.distributed.process import Runtime
from gardo.distributed.signals import leave
from gardo.rewards.scoring import RewardSet, ScoreBook
from gardo.sampling.plan import plan_epoch
from gardo.types import RewardOutput

PROMPTS, GROUP = 3, 5
EVERYTHING = {
    "algorithm.reward_scale": "auto",
    "algorithm.cap": "on",
    "algorithm.diversity": "supported",
    "algorithm.gate.anchor": "base",
    "algorithm.gate.uncertainty": "both",
}


def main(output: str) -> None:
    runtime = Runtime("cpu", threads=1)
    config = load_config("tiny")
    rewards = RewardSet(config.rewards.model_copy(update={"eval": []}), torch.device("cpu"))
    plan = plan_epoch(PROMPTS, GROUP, 2, runtime.rank, runtime.world_size)
    everything = torch.Generator().manual_seed(0)
    scores = torch.rand(3, PROMPTS * GROUP, generator=everything)
    features = torch.randn(PROMPTS * GROUP, 8, generator=everything)
    book = ScoreBook()
    mine = plan.sample_ids
    names = rewards.training_names
    columns = {name: scores[k, mine] for k, name in enumerate(names)}
    # a detail of all processes, and one that no other process has
    own = {"all": scores[0, mine], f"rank{runtime.rank}": torch.full((len(mine),), 2.0)}
    sigma = scores[0].flip(0)[mine] / 10
    columns[names[0]] = RewardOutput(columns[names[0]], own, sigma)
    book.add(columns, features[mine], dict.fromkeys(names, 0.0))
    shaped = Shaper(config.algorithm, rewards)(book, plan, runtime)
    for rank in range(runtime.world_size):
        assert shaped.metrics[f"reward/{names[0]}/rank{rank}/mean"] == 2.0
    detail = torch.tensor(shaped.metrics[f"reward/{names[0]}/all/mean"])
    advantage = runtime.gather(shaped.advantage, mine, PROMPTS * GROUP)
    gate = runtime.gather(shaped.gate.float(), mine, PROMPTS * GROUP)
    everything = load_config("tiny", overrides=list(EVERYTHING.items())).algorithm
    shaper = Shaper(everything, rewards)
    found = {}
    for epoch in range(2):  # the second one is compared with the first, which is the base's
        later = shaper(book, plan, runtime)
        found[f"{epoch}/advantage"] = runtime.gather(later.advantage, mine, PROMPTS * GROUP)
        found[f"{epoch}/gate"] = runtime.gather(later.gate.float(), mine, PROMPTS * GROUP)
        found[f"{epoch}/uncertainty"] = later.uncertainty
        own = ("rank0", "rank1", "rank2")  # details that depend on the number of processes
        figures = {k: v for k, v in later.metrics.items() if not any(o in k for o in own)}
        found[f"{epoch}/metrics"] = torch.tensor(list(figures.values()), dtype=torch.float64)
    if runtime.is_main:
        per_update = torch.tensor(shaped.gated_per_update)
        save_file(
            {"advantage": advantage, "gate": gate, "per_update": per_update, "detail": detail}
            | found,
            output,
        )
    runtime.close()


if __name__ == "__main__":
    main(sys.argv[1])
    leave(0)
