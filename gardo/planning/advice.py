"""What to change in a configuration so that it fits a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from gardo.config import Config, validate

# below this batch the GPU is not well used, and recomputing activations costs less
SMALL_BATCH = 4


@dataclass(frozen=True)
class Change:
    """A key to set, and why."""

    key: str
    value: Any
    reason: str

    def __str__(self) -> str:
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        if isinstance(self.value, list):
            value = ",".join(self.value) or "[]"
        return f"--{self.key} {value}"


@dataclass(frozen=True)
class Advice:
    """Changes in the order in which they were tried, the configuration with all of them.

    Attributes:
        fits: whether the configuration with the changes fits.
    """

    changes: tuple[Change, ...]
    config: Config
    fits: bool


def advise(config: Config, stages: Callable[[Config], dict[str, float]], limit: float) -> Advice:
    """Find the cheapest changes that make a configuration fit.

    Changes that cost no time come first, then smaller batches, then recomputation, at last what
    changes the run.

    Args:
        stages: estimates the bytes of each stage of a configuration.
        limit: bytes of one GPU.
    """
    search = _Search(config, stages, limit)
    for step in (
        search.decode_in_parts,
        search.free_graph,
        search.offload,
        lambda: search.shrink_batches(SMALL_BATCH),
        search.checkpoint,
        lambda: search.shrink_batches(1),
        search.drop_held_out,
        search.train_lora,
    ):
        if search.fits:
            break
        step()
    search.drop_needless()
    return Advice(search.changes, search.config, search.fits)


class _Search:
    def __init__(
        self, config: Config, stages: Callable[[Config], dict[str, float]], limit: float
    ) -> None:
        self.start = self.config = config
        self.steps: list[tuple[Change, ...]] = []  # changes that belong together
        self._stages = stages
        self._limit = limit

    @property
    def fits(self) -> bool:
        return self._fits(self.config)

    @property
    def changes(self) -> tuple[Change, ...]:
        return tuple(change for step in self.steps for change in step)

    def _fits(self, config: Config) -> bool:
        return max(self._stages(config).values()) <= self._limit

    def _over(self, *names: str) -> bool:
        """Whether one of these stages needs too much."""
        stages = self._stages(self.config)
        return any(stages[name] > self._limit for name in names)

    def _set(self, *changes: Change) -> None:
        self.config = with_changes(self.config, changes)
        self.steps.append(changes)

    def decode_in_parts(self) -> None:
        if not self._over("decoding"):
            return
        if not self.config.model.vae_slicing:
            self._set(Change("model.vae_slicing", True, "decode one image at a time"))
        if self._over("decoding") and self.config.model.vae_dtype in (None, "fp32"):
            self._set(Change("model.vae_dtype", "bf16", "a decoder of half the size"))

    def free_graph(self) -> None:
        if self.config.sampling.cuda_graph != "off" and self._over("training"):
            self._set(Change("sampling.cuda_graph", "off", "its memory stays reserved"))

    def offload(self) -> None:
        if self._over("rollout", "training") and not self.config.sampling.offload_trajectories:
            self._set(
                Change("sampling.offload_trajectories", True, "trajectories in the host's memory")
            )

    def checkpoint(self) -> None:
        if self._over("training") and not self.config.model.gradient_checkpointing:
            self._set(Change("model.gradient_checkpointing", True, "another forward in training"))

    def shrink_batches(self, smallest: int) -> None:
        """Both batches to the largest size that fits, if there is one."""
        sampling, train = self.config.sampling.batch_size, self.config.train.batch_size
        for size in range(max(sampling, train) - 1, smallest - 1, -1):
            changes = [
                Change(key, size, "equal batches keep the ratio at 1")
                for key, now in (("sampling.batch_size", sampling), ("train.batch_size", train))
                if now > size
            ]
            if self._fits(with_changes(self.config, changes)):
                self._set(*changes)
                return

    def drop_held_out(self) -> None:
        if self.config.rewards.eval:
            self._set(Change("rewards.eval", [], "no held-out rewards on this GPU"))

    def train_lora(self) -> None:
        if self.config.model.full_finetune:
            self._set(Change("model.full_finetune", False, "adapters instead of all weights"))

    def drop_needless(self) -> None:
        """Take back changes that a later, stronger one has made unnecessary, costly ones first."""
        if not self.fits:
            return
        for step in self.steps[::-1]:
            rest = [other for other in self.steps if other is not step]
            trial = with_changes(self.start, [change for other in rest for change in other])
            if self._fits(trial):
                self.config, self.steps = trial, rest


def with_changes(config: Config, changes: Iterable[Change]) -> Config:
    """A copy of a configuration with these keys changed."""
    data = config.model_dump(mode="json")
    for change in changes:
        *areas, last = change.key.split(".")
        node = data
        for area in areas:
            node = node[area]
        node[last] = change.value
    return validate(data)
