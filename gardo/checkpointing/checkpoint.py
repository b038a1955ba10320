"""Checkpoints: folders that are there whole or not at all, and are checked before they are used.

A checkpoint is a folder ``epoch_0040`` of safetensors, JSON and YAML files. ``manifest.json`` has
size and SHA-256 of each. It is written under another name, flushed to the disk and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gardo.types import UserError

if TYPE_CHECKING:  # a checkpoint is found and checked without torch
    from torch import Tensor

VERSION = 1
"""Of the format; raised when older code could not read it."""

_NAME = re.compile(r"epoch_(\d{4,})")
_TENSORS = ".safetensors"


@dataclass
class TrainingState:
    """Everything that the epochs to come depend on.

    Attributes:
        epoch: number of epochs done.
        tensors: group, such as ``policy``, -> name -> tensor on the host.
        values: JSON values by the part that they belong to.
    """

    epoch: int
    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any] = field(default_factory=dict)

    def check_groups(self, expected: Iterable[str]) -> None:
        """Raise ValueError unless exactly these groups of tensors are there."""
        expected = set(expected)
        if self.tensors.keys() != expected:
            raise ValueError(
                f"expected tensors of {', '.join(sorted(expected))}, got those of "
                f"{', '.join(sorted(self.tensors))}"
            )

    def value(self, name: str) -> Any:
        """JSON value of a part. Raises ValueError if there is none."""
        if name not in self.values:
            raise ValueError(f"no '{name}' in state.json")
        return self.values[name]


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not what its manifest says."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, by its manifest.

    Attributes:
        path: its folder.
        epoch: number of epochs done.
        metric: what the best checkpoint is chosen by, if anything.
        score: value of the metric; None where it was not measured after this epoch.
        files: name -> ``{"bytes": int, "sha256": str}``.
    """

    path: Path
    epoch: int
    metric: str | None
    score: float | None
    files: Mapping[str, Mapping[str, Any]]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the manifest.

        Raises:
            DamagedCheckpoint: it is missing or malformed.
            UserError: it was written in another format, or cannot be read.
        """
        text = _read(path, "manifest.json")
        manifest = _parse(path, "manifest.json", text)
        version = manifest.get("version")
        if isinstance(version, int) and version != VERSION:
            raise UserError(
                f"checkpoint '{path}': expected format version {VERSION}, got {version}; resume it "
                "with the version of gardo that wrote it"
            )
        epoch, metric, score = (manifest.get(k) for k in ("epoch", "metric", "score"))
        files = manifest.get("files")
        if (
            version == VERSION
            and isinstance(epoch, int)
            and epoch >= 0
            and isinstance(metric, str | None)
            and isinstance(score, int | float | None)
            and isinstance(files, dict)
            and {"state.json", "config.yaml"} <= files.keys()
            and all(_is_entry(name, entry) for name, entry in files.items())
        ):
            return cls(path, epoch, metric, score, files)
        raise DamagedCheckpoint(f"checkpoint '{path}': malformed manifest.json")

    def read(self, name: str) -> bytes:
        """A file's bytes, if they are the ones that were written; DamagedCheckpoint otherwise."""
        data, entry = _read(self.path, name), self.files[name]
        if len(data) != entry["bytes"]:
            raise DamagedCheckpoint(
                f"checkpoint '{self.path}': {name}: expected {entry['bytes']} bytes, "
                f"got {len(data)}"
            )
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise DamagedCheckpoint(
                f"checkpoint '{self.path}': {name}: the contents do not match their hash"
            )
        return data

    def verify(self) -> None:
        """Check every file; DamagedCheckpoint names the first one that is not as written."""
        for name in self.files:
            self.read(name)

    def load(self) -> TrainingState:
        """Read everything; DamagedCheckpoint as in `verify`."""
        import safetensors
        import safetensors.torch

        tensors = {}
        for name in self.files:
            if name.endswith(_TENSORS):
                try:
                    group = safetensors.torch.load(self.read(name))
                except safetensors.SafetensorError as error:
                    raise DamagedCheckpoint(f"checkpoint '{self.path}': {name}: {error}") from error
                tensors[name.removesuffix(_TENSORS)] = group
        values = _parse(self.path, "state.json", self.read("state.json"))
        return TrainingState(self.epoch, tensors, values)


class CheckpointFolder:
    """The checkpoints of a run."""

    def __init__(
        self, path: Path, keep_last: int = 2, keep_best: str | None = None, best: str = "max"
    ) -> None:
        """Keep the newest ``keep_last`` and, by the metric ``keep_best``, the best (max, min)."""
        self.path = path
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.sign = 1.0 if best == "max" else -1.0

    def save(self, state: TrainingState, config: str, score: float | None = None) -> Path:
        """Write a checkpoint and delete those that need not be kept.

        Args:
            state: what to write; tensors are contiguous and on the host.
            config: the run's configuration as YAML.
            score: value of the metric ``keep_best``, if it was measured.

        Returns:
            its folder.

        Raises:
            OSError: it could not be written; those that were there are intact.
        """
        import safetensors.torch

        target = self.path / f"epoch_{state.epoch:04d}"
        temporary = self.path / f".{target.name}.tmp"
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        try:
            files = {}
            for group, tensors in state.tensors.items():
                name = group + _TENSORS
                files[name] = _write(temporary / name, safetensors.torch.save(tensors))
            files["state.json"] = _write(temporary / "state.json", _json(state.values))
            files["config.yaml"] = _write(temporary / "config.yaml", config.encode())
            manifest = {
                "version": VERSION,
                "epoch": state.epoch,
                "metric": self.keep_best,
                "score": score,
                "files": files,
            }
            _write(temporary / "manifest.json", _json(manifest))
            _sync_folder(temporary)
            self._discard(target)
            os.replace(temporary, target)
            _sync_folder(self.path)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._prune()
        return target

    def all(self) -> list[Path]:
        """Folders that are named as checkpoints, the newest first; none is looked into."""
        if not self.path.is_dir():
            return []
        found = [p for p in self.path.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
        return sorted(found, key=_epoch, reverse=True)

    def newest(self, told: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None if there has been none.

        Args:
            told: is called with a sentence about each damaged one that is skipped.

        Raises:
            UserError: all are damaged, or one was written in another format.
        """
        problems = []
        for path in self.all():
            try:
                checkpoint = Checkpoint.open(path)
                checkpoint.verify()
            except DamagedCheckpoint as error:
                problems.append(str(error))
                continue
            for problem in problems:
                told(f"skipped, because it is damaged: {problem}")
            return checkpoint
        if problems:
            raise UserError("no checkpoint is whole: " + "; ".join(problems))
        return None

    def discard_after(self, epoch: int) -> None:
        """Delete the checkpoints of later epochs and what an ended process left unfinished."""
        for path in reversed(self.all()):
            if _epoch(path) > epoch:
                self._discard(path)
        if self.path.is_dir():
            for path in self.path.glob(".epoch_*"):
                shutil.rmtree(path)

    def _prune(self) -> None:
        paths = self.all()
        keep = set(paths[: self.keep_last])
        if self.keep_best is not None:
            scored = [(s, -_epoch(p), p) for p in paths if (s := self._score(p)) is not None]
            if scored:
                keep.add(max(scored)[2])
        for path in paths:
            if path not in keep:
                self._discard(path)

    def _score(self, path: Path) -> float | None:
        try:
            checkpoint = Checkpoint.open(path)
        except UserError:  # it will be named when somebody wants to resume from it
            return None
        if checkpoint.metric != self.keep_best or checkpoint.score is None:
            return None
        return self.sign * checkpoint.score

    def _discard(self, path: Path) -> None:
        """Delete a folder, which is at no moment half there under its name."""
        if path.exists():
            hidden = path.with_name(f".{path.name}.old")
            if hidden.exists():
                shutil.rmtree(hidden)
            os.replace(path, hidden)
            shutil.rmtree(hidden)


def _epoch(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"expected a folder epoch_NNNN, got '{path}'")
    return int(match[1])


def _is_entry(name: str, entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
        and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) is not None  # leads nowhere else
    )


def _json(value: Any) -> bytes:
    # a state may hold NaN, which Python reads back; it is no reason to lose it
    return (json.dumps(value, indent=1) + "\n").encode()


def _parse(path: Path, name: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"checkpoint '{path}': {name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DamagedCheckpoint(f"checkpoint '{path}': {name}: expected an object")
    return value


def _read(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except FileNotFoundError:
        raise DamagedCheckpoint(f"checkpoint '{path}': {name} is missing") from None
    except OSError as error:  # no permission, a file server that is away: nothing is damaged
        raise UserError(
            f"checkpoint '{path}': {name} cannot be read: {error.strerror or error}"
        ) from error


def _write(path: Path, data: bytes) -> dict[str, Any]:
    """Write a file through to the disk; returns its entry in the manifest."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
