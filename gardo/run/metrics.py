"""The metrics of a run on disk: JSON lines, one object per epoch, written as the run goes.

The file is meant to be followed while it grows (``tail -f``, a notebook) and to be compared
bitwise between runs, so a line appears whole or not at all and every float64 is written in its
shortest form that reads back as the same number.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

EVALUATION = "evaluation/"
"""Prefix of a metric of ``evaluation.jsonl`` where it stands beside those of ``metrics.jsonl``."""


def write_atomic(path: str | Path, data: bytes) -> Path:
    """Write `data` to `path` so that a reader sees the old content or the new one, never a part.

    The bytes go to a temporary file of the same folder (made if missing), which then takes the
    name. Returns the path. Raises OSError where the folder or the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def to_json_line(row: Mapping[str, Any]) -> str:
    """One object as strict JSON on one line, without the newline.

    Numbers of numpy and torch (anything with ``item()``) become Python numbers; NaN and the
    infinities, which JSON does not have, become null. Nested dicts, lists and tuples are allowed.
    Raises TypeError for a value that JSON cannot hold, naming its key.
    """
    return json.dumps({_key(k): _plain(v, str(k)) for k, v in row.items()}, allow_nan=False)


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"metrics: keys must be str, got {type(key).__name__} {key!r}")
    return key


def _plain(value: Any, name: str) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_key(k): _plain(v, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{name}[{i}]") for i, v in enumerate(value)]
    if callable(getattr(value, "item", None)):
        if getattr(value, "ndim", 0) != 0:
            raise TypeError(f"metrics: {name} must be a scalar, got shape {tuple(value.shape)}")
        return _plain(value.item(), name)
    raise TypeError(
        f"metrics: {name} must be a number, str, bool, None, list or dict, "
        f"got {type(value).__name__}"
    )


class MetricsWriter:
    """Append epochs to a JSON-lines file.

    Args:
        path: the file; its folder is made if missing.
        resume_epoch: the first epoch that will be written again. Lines of this epoch and later
            ones are dropped first (atomically), as is a last line that a killed run left
            unfinished. None starts a new file.

    Raises FileExistsError when `resume_epoch` is None and the file already has content: a second
    run in the same file would be indistinguishable from the first.
    """

    def __init__(self, path: str | Path, resume_epoch: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size > 0:
            if resume_epoch is None:
                raise FileExistsError(
                    f"{self.path} already holds metrics; give resume_epoch to "
                    "continue them, or use another folder"
                )
            self._drop_from(resume_epoch)
        # Unbuffered append: each line is one write(2) at the end of the file.
        self._file = io.FileIO(self.path, "a")

    def _drop_from(self, epoch: int) -> None:
        text = self.path.read_text(encoding="utf-8")
        lines = text.split("\n")
        rows = _parse(self.path, text, ignore_unfinished=True)
        kept = []
        for number, row in rows:
            if not isinstance(row.get("epoch"), int):
                raise ValueError(f"{self.path}, line {number}: no integer 'epoch'")
            if row["epoch"] < epoch:
                kept.append(lines[number - 1] + "\n")  # the very bytes: floats stay as they are
        write_atomic(self.path, "".join(kept).encode("utf-8"))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one epoch: a mapping with an int under ``epoch`` and JSON values elsewhere.

        Raises ValueError without an int ``epoch``, TypeError for a value JSON cannot hold, and
        OSError when the line could not be written whole (the disk is full).
        """
        epoch = row.get("epoch")
        if not isinstance(epoch, int) or isinstance(epoch, bool):
            raise ValueError(f"metrics: row needs an int 'epoch', got {epoch!r}")
        data = (to_json_line(row) + "\n").encode("utf-8")
        written = self._file.write(data)
        if written != len(data):
            os.ftruncate(self._file.fileno(), self._file.tell() - (written or 0))
            raise OSError(errno.ENOSPC, "the disk is full", str(self.path))

    def sync(self) -> None:
        """Wait until the disk has every line."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class NoWriter(MetricsWriter):
    """Writes nothing: what all processes but the main one have in place of a file."""

    def __init__(self) -> None:
        return

    def write(self, row: Mapping[str, Any]) -> None:
        return

    def sync(self) -> None:
        return

    def close(self) -> None:
        return


def read_metrics(path: str | Path, *, ignore_unfinished: bool = False) -> list[dict[str, Any]]:
    """Read a JSON-lines file as a list of objects; empty lines are skipped.

    With `ignore_unfinished`, a last line without its newline that does not parse is left out: a
    run was killed while writing it, or writes it at this moment.

    Raises ValueError naming file and line for anything that is not one strict JSON object per
    line (NaN and Infinity are not JSON), and OSError when the file cannot be read.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text") from error
    return [row for _, row in _parse(path, text, ignore_unfinished)]


def _parse(path: Path, text: str, ignore_unfinished: bool) -> list[tuple[int, dict[str, Any]]]:
    rows: list[tuple[int, dict[str, Any]]] = []
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_reject_constant)
        except (ValueError, RecursionError) as error:
            # After split, only text behind the last newline can be the last element.
            if ignore_unfinished and number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not a JSON object: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, line {number}: expected a JSON object, got {type(row).__name__}"
            )
        rows.append((number, row))
    return rows


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
