"""Training runs of an experiment: `python -m gardo.train` in parallel processes, each kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from gardo.config import Config, load_config, to_yaml
from gardo.types import UserError

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class TrainingRun:
    """One run of a recipe.

    Attributes:
        folder: its run folder; the output of the process is in a ``.log`` beside it.
        overrides: dotted keys and their values as on a command line, without ``output_dir``.
    """

    folder: Path
    overrides: dict[str, str]
    recipe: str = "tiny"

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return [*self.overrides.items(), ("threads", "1"), ("output_dir", str(self.folder))]

    @property
    def config(self) -> Config:
        return load_config(self.recipe, overrides=self.pairs)

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def command(self) -> list[str]:
        words = [word for name, value in self.pairs for word in (f"--{name}", value)]
        return [sys.executable, "-m", "gardo.train", self.recipe, "--resume", *words]

    def epochs_done(self) -> int:
        """Lines of the metrics file so far."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def finished(self) -> bool:
        """Whether an earlier call has completed this run.

        UserError where the folder holds a run with other settings.
        """
        stored = self.folder / "config.yaml"
        if not stored.exists():
            return False
        if stored.read_text(encoding="utf-8") != to_yaml(self.config):
            raise UserError(
                f"{self.folder}: expected a run with the experiment's settings, got one with "
                "others; choose another --out, or remove it"
            )
        return (self.folder / "summary.json").exists() and (self.folder / "report.html").exists()


def train_all(runs: Sequence[TrainingRun], jobs: int) -> None:
    """Train what is not there yet, ``jobs`` runs at a time with one thread each.

    An interrupted run goes on from its last checkpoint.

    Raises:
        UserError: a folder cannot be written or holds something else, or a run failed (its log is
            named). The other runs are asked to stop first.
    """
    waiting = [run for run in runs if not run.finished()]
    for folder in {run.folder.parent for run in waiting}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--out: expected a folder that can be made, got {folder} ({error})"
            ) from error
    every = [(run, run.config.epochs) for run in runs]
    running: list[tuple[TrainingRun, subprocess.Popen[bytes]]] = []
    done = sum(min(run.epochs_done(), epochs) for run, epochs in every)
    with tqdm(total=sum(n for _, n in every), initial=done, desc="epochs", unit="epoch") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running.append((run, _start(run)))
                time.sleep(POLL_SECONDS)
                for run, process in running:
                    if process.poll() not in (None, 0):
                        raise UserError(f"{run.folder.name}: {_reason(run)} (see {run.log})")
                running = [(run, process) for run, process in running if process.poll() is None]
                bar.n = sum(min(run.epochs_done(), epochs) for run, epochs in every)
                bar.set_postfix_str(", ".join(run.folder.name for run, _ in running))
        finally:
            for _, process in running:
                process.send_signal(signal.SIGTERM)
            for _, process in running:
                process.wait()


def _start(run: TrainingRun) -> subprocess.Popen[bytes]:
    with run.log.open("ab") as log:
        return subprocess.Popen(
            run.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def _reason(run: TrainingRun) -> str:
    lines = run.log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "failed without a word")
