"""The run folder: checks it before anything costly starts, and writes what a run leaves behind."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gardo.config import Config, to_yaml
from gardo.run.card import write_model_card
from gardo.run.images import drop_grids, read_index
from gardo.run.metrics import MetricsWriter, NoWriter, read_metrics, write_atomic
from gardo.types import UserError

PACKAGES = ("gardo", "torch", "triton", "diffusers", "transformers", "peft", "accelerate")


class RunFolder:
    """Paths of a run, its metrics files and its summary.

    Of several processes only the main one writes; the others have the same paths.

    Attributes:
        done: epochs that the run had done before this process.
        evaluated: whether the evaluation that follows them was, too.
        resumed: after how many epochs each time.
    """

    def __init__(self, path: Path, is_main: bool = True) -> None:
        self.path = path
        self.is_main = is_main
        self.images = path / "images"
        self.checkpoints = path / "checkpoints"
        self.export = path / "export"
        self.report = path / "report.html"
        self.started = self._session = time.time()
        self.seconds_before = 0.0
        self.resumed: list[int] = []
        self.done, self.evaluated = 0, False

    @property
    def seconds(self) -> float:
        """How long the run has taken, over all its processes before it was resumed, too."""
        return self.seconds_before + time.time() - self._session

    @classmethod
    def check(cls, config: Config, replace: bool = False) -> Path:
        """Whether a run can be written to ``output_dir``; changes nothing.

        Args:
            config: of the run.
            replace: as ``overwrite``: whether a run that is there may be replaced.

        Raises:
            UserError: the folder is not empty (unless it may be replaced and it is a run), cannot
                be written, or is no folder.
        """
        path = Path(config.output_dir).expanduser()
        check_writable(path)
        if path.is_dir() and any(not _is_leftover(p) for p in path.iterdir()):
            if not config.overwrite and not replace:
                raise UserError(
                    f"output_dir '{path}': expected an empty or new folder; choose another with "
                    "--output_dir, continue this run with --resume, or replace it with "
                    "--overwrite true"
                )
            if not (path / "config.yaml").is_file():
                raise UserError(
                    f"output_dir '{path}': not a run folder (no config.yaml), so it is not "
                    "overwritten; choose another"
                )
        return path

    @classmethod
    def create(cls, config: Config, replace: bool = False, is_main: bool = True) -> RunFolder:
        """Make an empty run folder with its ``config.yaml``; UserError as in `check`."""
        folder = cls(Path(config.output_dir).expanduser(), is_main)
        if not is_main:
            return folder
        path = cls.check(config, replace)
        try:
            path.mkdir(parents=True, exist_ok=True)
            # config.yaml, which tells that this is a run, goes last and comes first
            for old in sorted(path.iterdir(), key=lambda p: (p.name == "config.yaml", p.name)):
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
            write_atomic(path / "config.yaml", to_yaml(config).encode())
            for sub in (folder.images, folder.checkpoints, folder.export):
                sub.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"output_dir '{path}': cannot be written: {error.strerror or error}"
            ) from None
        return folder

    def cut_back(self, config: Config, epoch: int, evaluated: bool) -> None:
        """Cut a run back to what it was after ``epoch`` epochs, to go on from there.

        The metrics are cut when `metrics` and `evaluations` open them. Checkpoints are not touched.

        Args:
            config: of the run from now on.
            epoch: number of epochs done.
            evaluated: whether the evaluation after these epochs is kept.
        """
        self.done, self.evaluated = epoch, evaluated
        if not self.is_main:
            return
        for place in (self.path, self.images):
            for leftover in place.glob(".*.tmp"):
                leftover.unlink()
        drop_grids(self.images, epoch + evaluated)
        for sub in (self.images, self.checkpoints, self.export):
            sub.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / "config.yaml", to_yaml(config).encode())

    def check_continuable(self, epoch: int) -> None:
        """UserError unless the files of the first ``epoch`` epochs are there and whole."""
        path = self.path / "metrics.jsonl"
        try:
            rows = read_metrics(path, ignore_unfinished=True)
            read_metrics(self.path / "evaluation.jsonl", ignore_unfinished=True)
            if (self.images / "index.json").exists():
                read_index(self.images / "index.json")
        except (OSError, ValueError) as error:
            raise UserError(f"the run cannot be continued: {error}") from None
        found = [row.get("epoch") for row in rows]
        if found[:epoch] != list(range(epoch)):
            raise UserError(
                f"the run cannot be continued: '{path}': expected the epochs 0 to {epoch - 1}, "
                f"which the checkpoint has done, got {_span(found)}"
            )

    def metrics(self) -> MetricsWriter:
        return self._writer("metrics.jsonl", self.done)

    def evaluations(self) -> MetricsWriter:
        return self._writer("evaluation.jsonl", self.done + self.evaluated)

    def _writer(self, name: str, kept: int) -> MetricsWriter:
        if not self.is_main:
            return NoWriter()
        return MetricsWriter(self.path / name, kept if self.resumed else None)

    def clock(self) -> dict[str, Any]:
        """When the run began, how long it has taken, and after which epochs it was resumed."""
        return {"started": self.started, "seconds": self.seconds, "resumed": self.resumed}

    def set_clock(self, clock: Mapping[str, Any], epoch: int) -> None:
        """Go on from `clock`, resumed after ``epoch`` epochs."""
        self.started, self.seconds_before = float(clock["started"]), float(clock["seconds"])
        self.resumed = [*clock["resumed"], epoch]

    def finish(self, config: Config, family: str, **figures: Any) -> None:
        """Write the export's model card and ``summary.json``: when, how long, with what.

        Args:
            config: of the run.
            family: of the model.
            figures: further ones for the summary.
        """
        if not self.is_main:
            return
        rows = read_metrics(self.path / "evaluation.jsonl", ignore_unfinished=True)
        write_model_card(self.export, config, family, rows)
        summary = {
            "started": _iso(self.started),
            "finished": _iso(time.time()),
            "seconds": round(self.seconds, 3),
            "resumed_after_epochs": self.resumed,
            "command": shlex.join(sys.orig_argv),
            "python": platform.python_version(),
            "versions": package_versions(),
            "recipe": config.recipe,
            "peak_memory_bytes": peak_memory_bytes(),
            **figures,
        }
        write_atomic(self.path / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())


def check_writable(path: Path) -> None:
    """UserError unless ``path`` is a folder, or can be made, and may be written to."""
    try:
        parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    except OSError as error:  # a name too long, a loop of links, a working directory that is gone
        raise UserError(f"output_dir '{path}': {error.strerror or error}") from None
    if not parent.is_dir():
        raise UserError(f"output_dir '{path}': expected a folder, but '{parent}' is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"output_dir '{path}': no permission to write in '{parent}'")


def _is_leftover(path: Path) -> bool:
    """Whether a process ended while it made a run folder and left this."""
    return path.name.startswith(".config.yaml.") and path.name.endswith(".tmp")


def _span(epochs: Sequence[Any]) -> str:
    return f"{len(epochs)} epochs from {epochs[0]} to {epochs[-1]}" if epochs else "none"


def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on; those not installed are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
