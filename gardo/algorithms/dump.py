"""What is left of a batch that ended a run: one safetensors file and one JSON file beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gardo.run.metrics import to_json_line, write_atomic

LARGEST_DUMP = 64 * 2**20
"""Bytes of tensors in a dump, if a single row is not larger."""


def write_dump(
    path: Path,
    tensors: Mapping[str, Tensor],
    rows: Mapping[str, list[Any]],
    facts: Mapping[str, Any],
    largest: int = LARGEST_DUMP,
) -> Path:
    """Write ``path.safetensors`` and ``path.json``, each of them whole or not at all.

    A batch that is too large is cut to some of its rows, those with a number that is not finite
    first.

    Args:
        path: without a suffix; its folder is made if missing.
        tensors: ``[B, ...]`` each.
        rows: ``B`` JSON values each, such as prompts.
        facts: further JSON values.
        largest: bytes of tensors.

    Returns:
        the path of the safetensors file. Raises OSError if they cannot be written.
    """
    import safetensors.torch

    finite = {name: t.isfinite().flatten(1).all(1).cpu() for name, t in _columns(tensors).items()}
    whole = torch.stack([*finite.values()]).all(0)
    size = sum(t[:1].numel() * t.element_size() for t in tensors.values())
    count = min(len(whole), max(1, largest // max(size, 1)))
    # stable: within both kinds of rows the order stays
    kept = torch.sort(whole.int(), stable=True).indices[:count].sort().values
    described = {
        **facts,
        "rows": len(whole),
        "rows_kept": count,
        "rows_not_finite": int((~whole).sum()),
        "tensors_not_finite": [name for name, rows in finite.items() if not bool(rows.all())],
        **{name: [values[i] for i in kept.tolist()] for name, values in rows.items()},
    }
    text = json.dumps(json.loads(to_json_line(described)), indent=1, ensure_ascii=False) + "\n"
    on_host = {n: t.detach()[kept.to(t.device)].cpu().contiguous() for n, t in tensors.items()}
    written = write_atomic(
        path.with_name(f"{path.name}.safetensors"), safetensors.torch.save(on_host)
    )
    write_atomic(path.with_name(f"{path.name}.json"), text.encode("utf-8"))
    return written


def _columns(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor with at least two dimensions."""
    return {name: t if t.dim() > 1 else t[:, None] for name, t in tensors.items()}
