"""Rewards with known scores, as plain functions that reward servers import, and those servers."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gardo.rewards.base import RewardSpec
from gardo.types import RewardOutput
from tests.support import warm

ROOT = Path(__file__).parents[2]


def corner(images, prompts, metadata):
    """The red value of the first pixel."""
    return images[:, 0, 0, 0]


def length(images, prompts, metadata):
    """Characters of the prompt plus ``metadata["add"]``, as a list."""
    return [len(p) + float(m.get("add", 0)) for p, m in zip(prompts, metadata, strict=True)]


def brittle(images, prompts, metadata):
    """As `corner`, but raises on a batch with the prompt "bad" in it, and misses "none"."""
    if "bad" in prompts:
        raise ValueError("a bad prompt")
    missing = torch.tensor([p == "none" for p in prompts], dtype=torch.bool)
    return images[:, 0, 0, 0].masked_fill(missing, torch.nan)


def sleepy(images, prompts, metadata):
    """As `corner`, after the seconds that the metadata ask for."""
    time.sleep(max((float(m.get("seconds", 0)) for m in metadata), default=0))
    return images[:, 0, 0, 0]


def batch_size(images, prompts, metadata):
    """The size of the batch that an image was scored in, and a detail."""
    count = torch.full((len(images),), float(len(images)))
    return RewardOutput(count, {"twice": 2 * count})


batch_size.spec = RewardSpec(higher_is_better=False, value_range=(1.0, 8.0), batch_size=8)


def unsure(images, prompts, metadata):
    """As `brittle`, a tenth of it as its sigma, which it does not know for "vague"."""
    scores = brittle(images, prompts, metadata)
    vague = torch.tensor([p == "vague" for p in prompts], dtype=torch.bool)
    return RewardOutput(scores, sigma=(images[:, 0, 0, 0] / 10).masked_fill(vague, torch.nan))


class Slow:
    """A reward that takes seconds to build."""

    def __new__(cls, device, seconds=0.0):
        from gardo.rewards.functions import FunctionReward

        time.sleep(seconds)
        return FunctionReward("slow", corner, {})


def broken(device):
    raise ValueError("weights are missing")


def toy(name: str) -> str:
    return f"{__name__}:{name}"


class Server:
    """A server process; its URL stays the same over restarts."""

    def __init__(
        self,
        rewards: str,
        *options: str,
        env: dict[str, str] | None = None,
        python: str | None = None,
    ) -> None:
        self._rewards, self._options, self._env = rewards, options, env or {}
        self._python = python or warm.python()
        self.port = 0
        self.start()

    def start(self) -> None:
        command = [self._python, "-m", "gardo.rewards.serve", "--rewards", self._rewards]
        command += ["--port", str(self.port), "--device", "cpu", *self._options]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **self._env},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        first = self.process.stderr.readline()
        found = re.search(r"http://\S+:(\d+)", first)
        assert found, first + self.process.stderr.read()
        self.url, self.port = found[0], int(found[1])
        self.log: list[str] = []
        # read on, so that the process never waits for its log to be read
        self._reader = threading.Thread(target=self.log.extend, args=(self.process.stderr,))
        self._reader.start()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.wait()

    def stop(self) -> None:
        self.process.terminate()
        self.wait()

    def wait(self) -> int:
        code = self.process.wait(30)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@contextmanager
def serving(rewards: str, *options: str, **others: Any) -> Iterator[Server]:
    server = Server(rewards, *options, **others)
    try:
        yield server
    finally:
        if server.alive:
            server.kill()
