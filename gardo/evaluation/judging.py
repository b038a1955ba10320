"""Scores and features of cached images: what is missing is asked for and kept with the image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gardo.evaluation.cache import EvaluationCache, Record, content_name, decode_vector
from gardo.evaluation.cache import encode_vector as encode
from gardo.evaluation.drawing import Draw
from gardo.evaluation.progress import StageProgress
from gardo.evaluation.settings import Settings
from gardo.evaluation.statistics import Array
from gardo.rewards.overlap import MAX_PENDING, ScoringWorker
from gardo.rewards.scoring import RewardSet


class Judge:
    """Scores images as their PNGs have them, so that a resumed evaluation sees the same pixels."""

    def __init__(
        self,
        rewards: RewardSet,
        settings: Settings,
        cache: EvaluationCache,
        rescore: bool,
        device: torch.device,
    ) -> None:
        self.rewards = rewards
        self.settings = settings
        self.cache = cache
        self.rescore = rescore
        self.device = device

    def score(
        self,
        contender: str,
        records: Mapping[Draw, Record],
        progress: StageProgress,
        stop_point: Callable[[], None],
    ) -> None:
        """Score what is missing of a contender's images; a missing score is asked for again.

        Raises:
            UserError: a reward fails, or could not score more than ``rewards.max_missing_share``.
        """
        if self.rescore:
            for record in records.values():
                record.values.clear()
        groups = self._groups(records)
        todo = len({draw for draws in groups.values() for draw in draws})
        with progress.stage(f"{contender}: scores", todo, len(records) - todo) as advance:
            seen: set[Draw] = set()
            for (names, full), draws in groups.items():
                # so many batches overlap; then they are written
                size = self.settings.batch_size * MAX_PENDING
                for start in range(0, len(draws), size):
                    stop_point()
                    some = draws[start : start + size]
                    self._score(names, full, some, records)
                    advance(len(set(some) - seen))
                    seen.update(some)
        for name in self.rewards.all_names:
            scores = [self.found(name, draw, record) for draw, record in records.items()]
            self.rewards.check_missing(name, torch.tensor(scores))

    def _groups(
        self, records: Mapping[Draw, Record]
    ) -> dict[tuple[tuple[str, ...], bool], list[Draw]]:
        """Images that lack the same scores, and whether these are computed here or by servers.

        What is computed here is computed in full batches, so that a score does not depend on what
        was scored before; servers make batches of their own.
        """
        groups: dict[tuple[tuple[str, ...], bool], list[Draw]] = {}
        for draw, record in records.items():
            missing = [n for n in self.rewards.all_names if math.isnan(self.found(n, draw, record))]
            remote = [name for name in missing if self.rewards[name].spec.remote]
            local = [name for name in missing if name not in remote]
            extract = self.rewards.features is not None and self._feature_key() not in record.values
            if local or extract:
                groups.setdefault((tuple(local), True), []).append(draw)
            if remote:
                groups.setdefault((tuple(remote), False), []).append(draw)
        return groups

    def _score(
        self,
        names: Sequence[str],
        full: bool,
        draws: Sequence[Draw],
        records: Mapping[Draw, Record],
    ) -> None:
        size = self.settings.batch_size
        rows = [*draws, *[draws[-1]] * (-len(draws) % size if full else 0)]
        with ScoringWorker(self.rewards, names, self.device) as worker:
            for start in range(0, len(rows), size):
                some = rows[start : start + size]
                images = torch.stack([self.cache.image(records[draw]) for draw in some])
                prompts = [self.settings.prompts[draw.prompt] for draw in some]
                worker.submit(images.to(self.device), prompts)
            book = worker.collect()
        columns = {name: book.scores(name).tolist() for name in names}
        features = book.features()
        for row, draw in enumerate(draws):
            record = records[draw]
            for name, values in columns.items():
                value = values[row]
                record.values[self._score_key(name, draw)] = None if math.isnan(value) else value
            if features is not None and full:
                record.values[self._feature_key()] = encode(features[row])
            self.cache.save(record)

    def found(self, name: str, draw: Draw, record: Record) -> float:
        """A score; NaN where it is missing."""
        value = record.values.get(self._score_key(name, draw))
        return math.nan if value is None else float(value)

    def _score_key(self, name: str, draw: Draw) -> str:
        """A score depends on the prompt's metadata and the reward's parameters, too."""
        metadata = dict(self.settings.prompts[draw.prompt].metadata)
        parameters = self.settings.rewards.parameters.get(name, {})
        return f"score {name} {_short([name, parameters, metadata])}"

    def _feature_key(self) -> str:
        name = self.settings.rewards.features or ""
        return f"features {name} {_short([name, self.settings.rewards.parameters.get(name, {})])}"

    def scores(self, name: str, records: Mapping[Draw, Record]) -> Array:
        """``[prompts, seeds]``, as scored; NaN where missing."""
        out = np.full((len(self.settings.prompts), len(self.settings.seeds)), math.nan)
        for draw, record in records.items():
            out[draw] = self.found(name, draw, record)
        return out

    def features(self, records: Mapping[Draw, Record]) -> Tensor | None:
        """``[prompts, seeds, D]`` float32; None without an extractor."""
        if self.rewards.features is None:
            return None
        rows = {d: decode_vector(r.values[self._feature_key()]) for d, r in records.items()}
        width = len(next(iter(rows.values())))
        out = torch.full((len(self.settings.prompts), len(self.settings.seeds), width), torch.nan)
        for draw, row in rows.items():
            out[draw] = row
        return out


def _short(value: Any) -> str:
    return content_name(value)[:16]
