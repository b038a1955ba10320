"""The rewards of a server: built in the background while it already answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from gardo.rewards.base import Reward
from gardo.rewards.registry import build_reward
from gardo.rewards.serve.batching import Batcher
from gardo.rewards.serve.protocol import ProtocolError
from gardo.types import UserError


class Service:
    """Builds rewards and keeps a `Batcher` for each.

    Rewards that compute share one thread, since they may share a backbone and its tokenizer; a
    remote one has its own.

    Args:
        names: of the rewards.
        parameters: keyword arguments per name.
        device: where the rewards run.
        max_wait, max_pending: see `Batcher`.

    Attributes:
        batchers: by name, once they are ready.
        failure: the exception that ended the building, if any.
    """

    def __init__(
        self,
        names: Sequence[str],
        parameters: Mapping[str, Mapping[str, Any]],
        device: torch.device,
        *,
        max_wait: float = 0.005,
        max_pending: int = 4096,
    ) -> None:
        self.names = list(names)
        self.batchers: dict[str, Batcher] = {}
        self.failure: BaseException | None = None
        self._parameters = parameters
        self._device = device
        self._max_wait, self._max_pending = max_wait, max_pending
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="rewards")]
        self._building: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        return len(self.batchers) == len(self.names)

    def batcher(self, name: str) -> Batcher:
        """The batcher of a reward. Raises ProtocolError 404 unknown, 503 still loading."""
        if name not in self.names:
            raise ProtocolError(404, f"no reward '{name}'; serves {', '.join(self.names)}")
        if name not in self.batchers:
            raise ProtocolError(503, f"{name}: still loading")
        return self.batchers[name]

    def different_parameters(self, name: str, wanted: Mapping[str, Any]) -> list[str]:
        """Keys among ``wanted`` whose values are not those of the reward; ProtocolError 404.

        Only the keys are told: values may be nobody's business.
        """
        self.batcher(name)
        mine = self._parameters.get(name, {})
        return [key for key, value in wanted.items() if key not in mine or mine[key] != value]

    def start(self) -> asyncio.Task[None]:
        """Begin to build the rewards; the task ends when they are ready or one failed."""
        self._building = asyncio.create_task(self._build_all())
        return self._building

    async def stop(self) -> None:
        """Refuse what still waits, and end the threads after what they are doing."""
        if self._building is not None:
            self._building.cancel()
            await asyncio.wait([self._building])
        for batcher in self.batchers.values():
            await batcher.stop()
            batcher.reward.interrupt()
        for threads in self._threads:
            threads.shutdown(wait=False, cancel_futures=True)

    async def _build_all(self) -> None:
        for name in self.names:
            threads = self._threads[0]
            future = asyncio.get_running_loop().run_in_executor(threads, self._build, name)
            await asyncio.wait([future])
            self.failure = future.exception()
            if self.failure is not None:
                return
            reward = future.result()
            if reward.spec.remote:
                threads = ThreadPoolExecutor(1, thread_name_prefix=name)
                self._threads.append(threads)
            self.batchers[name] = Batcher(
                name,
                reward,
                threads,
                self._device,
                max_wait=self._max_wait,
                max_pending=self._max_pending,
            )

    def _build(self, name: str) -> Reward:
        parameters = dict(self._parameters.get(name, {}))
        try:
            return build_reward(name, self._device, **parameters)
        except TypeError as error:
            if not parameters:
                raise
            raise UserError(f"reward '{name}': {error}") from None
