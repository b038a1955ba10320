"""All runs of the experiment: in parallel processes, each finished run kept in a file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from experiments.mixture.methods import PARTS, find_method, find_part
from experiments.mixture.policy import VelocityNetwork, pretrain
from experiments.mixture.training import Run, Settings
from gardo.types import UserError

QUICK = Settings(epochs=8, groups=8, group_size=8, pretraining_steps=200, evaluation_samples=256)
PLOTTED_SAMPLES = 300

Record = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One run: a method on a part of the experiment from one seed."""

    part: str
    method: str
    seed: int
    settings: Settings
    out: Path

    @property
    def path(self) -> Path:
        return self.out / "runs" / f"{self.part}-{self.method}-seed{self.seed}.json"

    @property
    def identity(self) -> Record:
        """What a stored result must agree with to be that of this task."""
        method = find_method(find_part(self.part), self.method)
        return {
            "part": self.part,
            "method": self.method,
            "seed": self.seed,
            "settings": asdict(self.settings),
            "algorithm": method.algorithm.model_dump(mode="json"),
        }

    def stored(self) -> Record | None:
        """The result of an earlier call; None if there is none, or one of other settings."""
        if not self.path.exists():
            return None
        try:
            record: Record = json.loads(self.path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{self.path}: expected a stored result, got {error}") from error
        identity = self.identity
        return record if {key: record.get(key) for key in identity} == identity else None


def run_all(seeds: Sequence[int], settings: Settings, out: Path, jobs: int) -> list[Record]:
    """Results of every method of every part for every seed; only missing ones are computed.

    Raises UserError if ``out`` cannot be written.
    """
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out: expected a folder that can be made, got {out} ({error})"
        ) from error
    tasks = [
        Task(part.name, method.name, seed, settings, out)
        for seed in seeds
        for part in PARTS
        for method in part.methods
    ]
    missing = [task for task in tasks if task.stored() is None]
    bases = {task.seed: task for task in missing if not _base_path(task).exists()}
    _in_processes(_pretrain, list(bases.values()), jobs, "pretraining")
    _in_processes(_run, missing, jobs, "runs")
    records = []
    for task in tasks:
        record = task.stored()
        if record is None:
            raise UserError(f"{task.path}: changed or removed while the experiment ran")
        records.append(record)
    return records


def _in_processes(work: Callable[[Task], None], tasks: list[Task], jobs: int, what: str) -> None:
    """Call ``work`` on every task, with a bar of those that are done."""
    bar = tqdm(total=len(tasks), desc=what, disable=not tasks)
    with bar:
        for _ in _calls(work, tasks, min(jobs, len(tasks))):
            bar.update(1)


def _calls(work: Callable[[Task], None], tasks: list[Task], jobs: int) -> Iterable[None]:
    if jobs <= 1:
        yield from map(work, tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(work, task) for task in tasks]):
            yield done.result()


def _base_path(task: Task) -> Path:
    steps = task.settings.pretraining_steps
    return task.out / "runs" / f"pretrained-{steps}-seed{task.seed}.safetensors"


def _pretrain(task: Task) -> None:
    torch.set_num_threads(1)
    network = pretrain(task.seed, task.settings.pretraining_steps)
    path = _base_path(task)
    unfinished = path.with_suffix(f".{os.getpid()}")
    save_file(network.state_dict(), unfinished)
    unfinished.replace(path)


def _run(task: Task) -> None:
    torch.set_num_threads(1)
    base = VelocityNetwork()
    base.load_state_dict(load_file(_base_path(task)))
    part = find_part(task.part)
    run = Run(part, find_method(part, task.method), base, task.settings, task.seed)
    started = time.perf_counter()
    start = run.evaluate()
    epochs = [run.epoch(index) for index in range(task.settings.epochs)]
    record = {
        **task.identity,
        "seconds": round(time.perf_counter() - started, 2),
        "start": start,
        "end": run.evaluate(),
        "epochs": {name: [round(row[name], 6) for row in epochs] for name in epochs[0]},
        "samples": [[round(x, 3) for x in p] for p in run.draw()[:PLOTTED_SAMPLES].tolist()],
    }
    unfinished = task.path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(record), encoding="utf-8")
    unfinished.replace(task.path)
