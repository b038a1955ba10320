"""The run folder: checks it before anything costly starts, and writes what a run leaves behind."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gardo.config import Config, to_yaml
from gardo.runtime.metrics import MetricsWriter, write_atomic
from gardo.types import UserError

PACKAGES = ("gardo", "torch", "triton", "diffusers", "transformers", "peft", "accelerate")


class RunFolder:
    """Paths of a run, its metrics files and its summary."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images = path / "images"
        self.checkpoints = path / "checkpoints"
        self.export = path / "export"
        self.report = path / "report.html"
        self.started = time.time()

    @classmethod
    def check(cls, config: Config) -> Path:
        """Whether a run can be written to ``output_dir``; changes nothing.

        Raises:
            UserError: the folder is not empty (unless ``overwrite`` and it is a run), cannot be
                written, or is no folder.
        """
        path = Path(config.output_dir).expanduser()
        if path.exists() and not path.is_dir():
            raise UserError(f"output_dir '{path}': expected a folder, got a file")
        parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"output_dir '{path}': no permission to write in '{parent}'")
        if path.is_dir() and any(path.iterdir()):
            if not config.overwrite:
                raise UserError(
                    f"output_dir '{path}': expected an empty or new folder; choose another with "
                    "--output_dir, or replace this run with --overwrite true"
                )
            if not (path / "config.yaml").is_file():
                raise UserError(
                    f"output_dir '{path}': not a run folder (no config.yaml), so it is not "
                    "overwritten; choose another"
                )
        return path

    @classmethod
    def create(cls, config: Config) -> RunFolder:
        """Make an empty run folder with its ``config.yaml``; UserError as in `check`."""
        path = cls.check(config)
        folder = cls(path)
        try:
            if path.is_dir():
                for old in path.iterdir():
                    shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
            for sub in (folder.images, folder.checkpoints, folder.export):
                sub.mkdir(parents=True, exist_ok=True)
            write_atomic(path / "config.yaml", to_yaml(config).encode())
        except OSError as error:
            raise UserError(
                f"output_dir '{path}': cannot be written: {error.strerror or error}"
            ) from None
        return folder

    def metrics(self) -> MetricsWriter:
        return MetricsWriter(self.path / "metrics.jsonl")

    def evaluations(self) -> MetricsWriter:
        return MetricsWriter(self.path / "evaluation.jsonl")

    def write_summary(self, **figures: Any) -> None:
        """Write ``summary.json``: when, how long, with what; plus the given figures."""
        finished = time.time()
        summary = {
            "started": _iso(self.started),
            "finished": _iso(finished),
            "seconds": round(finished - self.started, 3),
            "command": shlex.join(sys.orig_argv),
            "python": platform.python_version(),
            "versions": package_versions(),
            **figures,
        }
        write_atomic(self.path / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())


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
