"""Prompt embeddings, computed once per distinct prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gardo.models.base import FlowModel
from gardo.types import PromptEmbeds

EMPTY = ""


class EmbeddingTable:
    """Embeddings of all distinct prompts of a run on the model's device, looked up by text.

    The empty prompt, which guidance needs, is always there. Encoding is batched; the text
    encoders are not needed once the table stands.
    """

    def __init__(self, model: FlowModel, prompts: Sequence[str], batch_size: int = 32) -> None:
        texts = list(dict.fromkeys([EMPTY, *prompts]))
        parts = [
            model.encode_prompts(texts[i : i + batch_size])
            for i in range(0, len(texts), batch_size)
        ]
        names = parts[0].tensors.keys()
        # cat outside inference mode gives normal tensors, which training can save for backward
        self._embeds = PromptEmbeds(
            {name: torch.cat([part.tensors[name] for part in parts]) for name in names}
        )
        self._row = {text: row for row, text in enumerate(texts)}

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embeddings of the given prompts, a row each."""
        device = next(iter(self._embeds.tensors.values())).device
        rows = torch.tensor([self._row[text] for text in prompts], device=device)
        return self._embeds.select(rows)
