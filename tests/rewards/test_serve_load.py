"""64 clients at once: every request is answered, and with its own scores.

The short form runs always; ``GARDO_LOAD_SECONDS=30`` makes it the full one.
"""

from __future__ import annotations

import os
import random
import threading
import time

import torch

from gardo.config.schema import RewardClientConfig
from gardo.rewards.remote import RemoteReward
from tests.rewards import toys
from tests.rewards.toys import toy

CLIENTS = 64
SECONDS = float(os.environ.get("GARDO_LOAD_SECONDS", "3"))
CONFIG = RewardClientConfig(retries=0, timeout=60.0, startup_timeout=60.0)


class Client(threading.Thread):
    """Asks for one of two rewards with images, prompts and sizes that no other request has."""

    def __init__(self, number: int, url: str) -> None:
        super().__init__(name=f"client-{number}")
        self.random = random.Random(number)
        name = toy("corner") if number % 2 else toy("length")
        self.reward = RemoteReward(name, [url], CONFIG)
        self.end, self.requests, self.images = 0.0, 0, 0
        self.wrong: list[tuple[list[float], list[float]]] = []
        self.slowest = 0.0

    def run(self) -> None:
        while time.monotonic() < self.end:
            count, side = self.random.randint(1, 4), self.random.choice((4, 4, 4, 6))
            images = torch.zeros(count, 3, side, side)
            values = [self.random.random() for _ in range(count)]
            images[:, 0, 0, 0] = torch.tensor(values)
            records = [{"add": self.random.randrange(10**6)} for _ in range(count)]
            prompts = ["x" * self.random.randrange(50) for _ in range(count)]
            started = time.monotonic()
            got = self.reward.score(images, prompts, records).scores.tolist()
            self.slowest = max(self.slowest, time.monotonic() - started)
            if self.reward.name == toy("corner"):
                expected = images[:, 0, 0, 0].tolist()
            else:
                expected = [float(len(p) + r["add"]) for p, r in zip(prompts, records, strict=True)]
            if got != expected:
                self.wrong.append((got, expected))
            self.requests += 1
            self.images += count


def test_no_score_is_lost_or_mixed_up() -> None:
    failures: list[threading.ExceptHookArgs] = []
    hook, threading.excepthook = threading.excepthook, failures.append
    try:
        with toys.serving(f"{toy('corner')},{toy('length')}") as server:
            RemoteReward(toy("corner"), [server.url], CONFIG)  # waits until it is ready
            clients = [Client(number, server.url) for number in range(CLIENTS)]
            end = time.monotonic() + SECONDS
            for client in clients:
                client.end = end
                client.start()
            for client in clients:
                client.join(SECONDS + 90)
                assert not client.is_alive()
            assert server.alive
    finally:
        threading.excepthook = hook
    assert failures == []  # a lost request raises in its client
    assert [client.wrong for client in clients if client.wrong] == []
    assert all(client.requests > 0 for client in clients)
    print(
        f"{CLIENTS} clients, {SECONDS:g} s: {sum(c.requests for c in clients)} requests, "
        f"{sum(c.images for c in clients)} images, slowest {max(c.slowest for c in clients):.2f} s"
    )
