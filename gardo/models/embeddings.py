"""Prompt embeddings, computed once per distinct prompt, and kept on disk if a folder is given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gardo.config import Config
from gardo.models.base import FlowModel
from gardo.run.metrics import write_atomic
from gardo.types import PromptEmbeds, UserError

EMPTY = ""


class EmbeddingTable:
    """Embeddings of all distinct prompts of a run, looked up by text.

    Encoding is batched; the text encoders are not needed once the table stands. The rows wait in
    host memory or, with a cache, on disk: a data set of prompts takes tens of gigabytes. On the
    device are the prompts of the last `stage` and the empty one, which guidance needs.
    """

    def __init__(
        self,
        model: FlowModel,
        prompts: Sequence[str],
        batch_size: int = 32,
        cache: EmbeddingCache | None = None,
    ) -> None:
        self._device = model.device
        self._cache = cache
        self._texts = dict.fromkeys([EMPTY, *prompts])
        self._rows: dict[str, dict[str, Tensor]] = {}
        missing = [text for text in self._texts if cache is None or cache.load(text) is None]
        for start in range(0, len(missing), batch_size):
            some = missing[start : start + batch_size]
            tensors = {n: t.cpu() for n, t in model.encode_prompts(some).tensors.items()}
            for i, text in enumerate(some):
                row = {name: tensor[i].clone() for name, tensor in tensors.items()}
                if cache is None:
                    self._rows[text] = row
                else:
                    cache.save(text, row)
        self.encoded = len(missing)
        self.stage([])

    def stage(self, prompts: Sequence[str]) -> None:
        """Bring the embeddings of these prompts to the device, in place of the last ones."""
        texts = list(dict.fromkeys([EMPTY, *prompts]))
        rows = [self._load(text) for text in texts]
        # stacking outside inference mode gives normal tensors, which training can save
        with torch.inference_mode(False):
            self._embeds = PromptEmbeds(
                {n: torch.stack([row[n] for row in rows]).to(self._device) for n in rows[0]}
            )
        self._row = {text: row for row, text in enumerate(texts)}

    def _load(self, text: str) -> dict[str, Tensor]:
        if text not in self._texts:
            raise KeyError(f"prompt {text!r} was not among those that were encoded")
        row = self._rows.get(text)
        if row is None and self._cache is not None:
            row = self._cache.load(text)
        if row is None:
            raise UserError(
                f"model.embedding_cache: the embedding of prompt {json.dumps(text)} was there when "
                "the run began and is gone or damaged; start again to encode it"
            )
        return row

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embeddings of the given prompts, a row each; stages them unless all of them are there."""
        if any(text not in self._row for text in prompts):
            self.stage(prompts)
        rows = torch.tensor([self._row[text] for text in prompts], device=self._device)
        return self._embeds.select(rows)


class EmbeddingCache:
    """One safetensors file per prompt, named by a hash of everything the embedding depends on.

    Several processes may share a folder: a reader never sees half a file. A damaged file is encoded
    again and replaced.
    """

    def __init__(self, folder: Path, **key: Any) -> None:
        """``key`` identifies the encoders: model, revision, T5 length, dtype.

        Raises:
            UserError: the folder cannot be made.
        """
        self.folder = folder
        self.key = key
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"model.embedding_cache '{folder}': cannot be made: {error.strerror}"
            ) from None

    def path(self, prompt: str) -> Path:
        text = json.dumps({**self.key, "prompt": prompt}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"

    def load(self, prompt: str) -> dict[str, Tensor] | None:
        """The cached tensors of a prompt, or None if there are none or they are damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(self.path(prompt).read_bytes())
        except (FileNotFoundError, SafetensorError):
            return None

    def save(self, prompt: str, tensors: dict[str, Tensor]) -> None:
        """Write the tensors of a prompt. Raises UserError when the folder cannot be written."""
        from safetensors.torch import save

        data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        try:
            write_atomic(self.path(prompt), data)
        except OSError as error:
            raise UserError(
                f"model.embedding_cache '{self.folder}': cannot be written: {error.strerror}"
            ) from None


def embedding_cache(config: Config) -> EmbeddingCache | None:
    """The cache that a configuration asks for; its key is what the embeddings depend on."""
    model = config.model
    if model.embedding_cache is None:
        return None
    return EmbeddingCache(
        Path(model.embedding_cache).expanduser(),
        path=model.path,
        revision=model.revision,
        variant=model.variant,
        max_sequence_length=model.max_sequence_length,
        precision=config.precision,
    )
