"""Prompts from a data set of the Hugging Face hub."""

from __future__ import annotations

from gardo.types import Prompt, UserError


def read_hub_prompts(name: str, split: str, column: str) -> list[Prompt]:
    """Read a column of texts.

    Args:
        name: hub id, or a folder with data files (parquet, json, csv, text).
        split: such as ``train``; slices such as ``train[:1000]`` work, too.
        column: which column has the prompts.

    Raises:
        UserError: the package ``datasets`` is not installed, the data set, split or column does
            not exist, or, with the row, a value is no text or blank.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            "prompts.dataset needs the package 'datasets': pip install 'gardo[datasets]'"
        ) from None
    where = f"data set '{name}', split '{split}'"
    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:  # the hub's own errors derive from these
        raise UserError(f"{where} cannot be loaded: {error}") from error
    if column not in rows.column_names:
        raise UserError(
            f"{where}: prompts.column: expected one of {', '.join(rows.column_names)}; "
            f"got '{column}'"
        )
    prompts = []
    for number, text in enumerate(rows[column], start=1):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}, row {number}: expected a prompt, got {text!r}")
        prompts.append(Prompt(text.strip(), origin=f"{where}, row {number}"))
    if not prompts:
        raise UserError(f"{where}: expected at least one prompt, got none")
    return prompts
