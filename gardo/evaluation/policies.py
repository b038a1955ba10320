"""Loads the models of an evaluation; puts contenders' weights on the base model and off again."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from gardo.config import Config, ModelConfig
from gardo.evaluation.settings import Contender
from gardo.evaluation.sources import LORA_FILE
from gardo.models.base import FlowModel
from gardo.models.embeddings import EmbeddingTable, embedding_cache
from gardo.models.loading import load_model
from gardo.sampling.graph import GraphedTrajectories, use_graphs
from gardo.sampling.rollout import Sampler
from gardo.types import UserError

_ADAPTER = "contender"


@dataclass(frozen=True)
class Policy:
    """A contender that is ready to draw.

    Attributes:
        sampler: draws with its weights.
        base: a block in which the sampler that it gives has the base model's weights.
    """

    sampler: Sampler
    base: Callable[[], AbstractContextManager[Sampler]]


class Policies:
    """The models that contenders need. The base model is loaded once, when first needed."""

    def __init__(
        self,
        config: Config,
        contenders: Sequence[Contender],
        base: ModelConfig | None,
        prompts: Sequence[str],
        guidance: float,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.contenders = contenders
        self.base_model = base
        self.prompts = prompts
        self.guidance = guidance
        self.batch_size = batch_size
        self.device = device
        self._graphs = use_graphs(config.sampling.cuda_graph, device)
        self._base: Sampler | None = None

    @contextmanager
    def use(self, contender: Contender) -> Iterator[Policy]:
        """Make a contender ready for the block."""
        source = contender.source
        if source.folder is None:
            if contender.model == self.base_model:
                yield Policy(self.base, lambda: contextlib.nullcontext(self.base))
                return
            sampler = self._load(contender.model)
            yield Policy(sampler, lambda: contextlib.nullcontext(self.base))
            del sampler
            self._free()
            return
        weights = _lora if source.kind == "lora" else _transformer
        sampler = self.base
        sampler.graphs = self._new_graphs()  # a graph knows the layers that it was captured with
        try:
            with weights(sampler.model, contender) as without:
                yield Policy(sampler, lambda: _inside(without, sampler))
        finally:
            sampler.graphs = self._new_graphs()
            self._free()

    @property
    def base(self) -> Sampler:
        """The sampler of the base model."""
        if self._base is None:
            if self.base_model is None:
                raise ValueError("base: expected a model, got None")
            self._base = self._load(self.base_model)
            for contender in self.contenders:  # now, and not after hours of drawing
                if contender.source.kind == "lora":
                    _check_lora(self._base.model.transformer, contender)
        return self._base

    def _load(self, options: ModelConfig) -> Sampler:
        # neither is of use here, and a compiled block would not see adapters come and go
        options = options.model_copy(update={"compile": False, "gradient_checkpointing": False})
        config = self.config.model_copy(update={"model": options})
        model = load_model(options, self.device, self.config.precision)
        embeddings = EmbeddingTable(model, self.prompts, cache=embedding_cache(config))
        model.release_text_encoders()
        return Sampler(
            model,
            embeddings,
            self.config.sampling.resolution or model.default_resolution,
            self.guidance,
            self.batch_size,
            graphs=self._new_graphs(),
        )

    def _new_graphs(self) -> GraphedTrajectories | None:
        return GraphedTrajectories() if self._graphs else None

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def _inside(
    without: Callable[[], AbstractContextManager[None]], sampler: Sampler
) -> Iterator[Sampler]:
    with without():
        yield sampler


@contextmanager
def _lora(
    model: FlowModel, contender: Contender
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Put LoRA weights on for the block; gives a block in which they are off."""
    transformer = cast(Any, model.transformer)
    try:
        transformer.load_lora_adapter(
            str(contender.source.folder),
            weight_name=LORA_FILE,
            adapter_name=_ADAPTER,
            use_safetensors=True,
            local_files_only=True,
        )
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"--runs '{contender.source.given}': {LORA_FILE}: {error}") from error
    transformer.requires_grad_(False)
    transformer.to(model.device)

    @contextmanager
    def without() -> Iterator[None]:
        transformer.disable_lora()
        try:
            yield
        finally:
            transformer.enable_lora()

    try:
        yield without
    finally:
        transformer.unload_lora()


def _check_lora(transformer: Any, contender: Contender) -> None:
    """Refuse LoRA weights of another format or model; a loader would skip what does not fit."""
    folder = contender.source.folder
    where = f"--runs '{contender.source.given}': {LORA_FILE}"
    try:
        with safe_open(f"{folder}/{LORA_FILE}", framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where} cannot be read: {error}") from None
    if not shapes:
        raise UserError(f"{where}: expected LoRA weights, got an empty file")
    for name, shape in shapes.items():
        module, _, part = name.removeprefix("transformer.").rpartition(".lora_")
        if not name.startswith("transformer.") or part not in ("A.weight", "B.weight"):
            raise UserError(
                f"{where}: expected weights of the transformer in diffusers' format "
                f"(transformer.MODULE.lora_A.weight and lora_B.weight), got '{name}'"
            )
        try:
            target = transformer.get_submodule(module)
        except AttributeError:
            target = None
        side = (1, "in_features") if part.startswith("A") else (0, "out_features")
        expected = getattr(target, side[1], None)
        if len(shape) != 2 or shape[side[0]] != expected:
            raise UserError(
                f"{where} does not fit the base model '{contender.model.path}': '{name}' has shape "
                f"{shape}, the model has "
                + (f"{expected} {side[1]} there" if expected else "no such layer")
            )


@contextmanager
def _transformer(
    model: FlowModel, contender: Contender
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Run another transformer in the block; gives a block in which the base's runs."""
    own = cast(Any, model.transformer)
    try:
        other = type(own).from_pretrained(
            contender.source.folder,
            torch_dtype=own.dtype,
            use_safetensors=True,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"--runs '{contender.source.given}': its transformer cannot be loaded: {error}"
        ) from error
    other.requires_grad_(False).eval().to(model.device)
    model.module = other

    @contextmanager
    def without() -> Iterator[None]:
        model.module = own
        try:
            yield
        finally:
            model.module = other

    try:
        yield without
    finally:
        model.module = own
