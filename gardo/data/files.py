"""Prompts from text files, JSON lines and folders in Flow-GRPO's layout."""

from __future__ import annotations

import json
from pathlib import Path

from gardo.types import Prompt, UserError


def read_prompts(path: Path, split: str) -> list[Prompt]:
    """Read a prompt file, or the file of a split in a folder.

    A folder has Flow-GRPO's layout: ``{split}_metadata.jsonl``, or else ``{split}.txt``.

    Raises:
        UserError: what `read_prompt_file` raises, or a folder without a file of this split.
    """
    if not path.is_dir():
        return read_prompt_file(path)
    if Path(split).name != split:  # it becomes part of a file's name
        raise UserError(f"prompts.split: expected a plain name such as train, got '{split}'")
    candidates = [path / f"{split}_metadata.jsonl", path / f"{split}.txt"]
    for candidate in candidates:
        if candidate.exists():
            return read_prompt_file(candidate)
    expected = " or ".join(file.name for file in candidates)
    raise UserError(f"prompt folder '{path}': expected {expected} for prompts.split '{split}'")


def read_prompt_file(path: Path) -> list[Prompt]:
    """Read a ``.txt`` file (a prompt a line) or ``.jsonl`` (objects with ``prompt`` and metadata).

    Blank lines may end the file but not stand between prompts, where they are a lost prompt more
    often than not. White space around a prompt and a byte order mark are dropped.

    Raises:
        UserError: the file is missing, empty, of another kind, or, with the line, not UTF-8,
            blank or malformed.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"prompt file '{path}': expected a .txt or .jsonl file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"prompt file '{path}' does not exist") from None
    except OSError as error:
        raise UserError(f"prompt file '{path}' cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"prompt file '{path}', line {line}: expected UTF-8 text") from None
    rows = text.rstrip().split("\n")
    if rows == [""]:
        raise UserError(f"prompt file '{path}': expected at least one prompt, got an empty file")
    parse = _parse_record if path.suffix == ".jsonl" else _parse_text
    prompts = []
    for number, row in enumerate(rows, start=1):
        origin = f"{path}, line {number}"
        try:
            prompts.append(parse(row, origin))
        except ValueError as error:
            raise UserError(f"prompt file '{path}', line {number}: {error}") from None
    return prompts


def _parse_text(line: str, origin: str) -> Prompt:
    if not line.strip():
        raise ValueError("expected a prompt, got an empty line")
    return Prompt(line.strip(), origin=origin)


def _parse_record(line: str, origin: str) -> Prompt:
    if not line.strip():
        raise ValueError("expected a JSON object, got an empty line")
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON object ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("expected a JSON object, got one that is nested too deeply") from None
    text = record.pop("prompt", None) if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError('expected a JSON object with a non-empty string "prompt"')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"prompt: expected Unicode text, got {text!a}") from None
    return Prompt(text.strip(), record, origin=origin)
