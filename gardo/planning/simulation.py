"""Costs of one sample, found by running the real modules on the meta device.

There tensors have shapes and no contents: nothing is allocated or computed, but every operation is
seen. The floating-point operations are counted by torch's own counter, the memory by following the
life of every storage.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gardo.config import Config
from gardo.families import FAMILIES, Architecture
from gardo.models.adapters import POLICY, build_adapters
from gardo.models.architectures import build_transformer, build_vae, parameter_count
from gardo.models.loading import DTYPES

# flash attention needs heads of at most 256; above (the VAE's) torch falls back to other kernels
FLASH_HEAD_DIM = 256


@dataclass(frozen=True)
class SampleCosts:
    """What one sample (with its empty-prompt twin, if guided) costs at a resolution.

    Attributes:
        trainable: trained parameters (LoRA, or the whole transformer).
        latent_values: numbers in one latent.
        forward_flops: of one forward, per row.
        backward_flops: of one backward, per row.
        forward_bytes: highest working memory of a forward without gradient, per sample.
        saved_bytes: activations that a forward keeps for backward, per sample.
        saved_bytes_checkpointed: the same with gradient checkpointing.
        block_bytes: the most that a single block keeps, per sample.
        train_transient_bytes: what backward needs above the saved activations, per sample.
    """

    trainable: int
    latent_values: int
    forward_flops: float
    backward_flops: float
    forward_bytes: int
    saved_bytes: int
    saved_bytes_checkpointed: int
    block_bytes: int
    train_transient_bytes: int


class StorageTracker(TorchDispatchMode):
    """Follows the bytes of all storages that are made inside the block and still alive."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """``known`` tensors, such as weights, are not counted, nor are views of them."""
        super().__init__()
        self.live = 0
        self.peak = 0
        self._bytes: dict[int, tuple[int, weakref.ref]] = {}
        for tensor in known:
            self._add(tensor, counted=False)

    def _add(self, tensor: Tensor, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._bytes:
            if self._bytes[key][1]() is storage:
                return
            self._remove(key)  # the address of a dead storage, used again
        size = storage.nbytes() if counted else 0
        ref = weakref.ref(storage, lambda dead: self._remove(key, dead))
        self._bytes[key] = (size, ref)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int, dead: weakref.ref | None = None) -> None:
        if key in self._bytes and (dead is None or self._bytes[key][1] is dead):
            self.live -= self._bytes.pop(key)[0]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out


class GPUArithmetic(TorchFunctionMode):
    """What a GPU would do differently from the meta device: flash attention and autocast.

    Autocast's rules as far as these models meet them: linear layers in the low precision, layer
    norms and powers in float32. ``dtype`` float32 leaves the types alone.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if self.dtype != torch.float32:
            if func is F.linear:
                args, kwargs = _cast(args, self.dtype), dict(kwargs)
            elif func in (F.layer_norm, torch.pow, Tensor.pow):
                args = _cast(args, torch.float32)
                kwargs = {k: _cast((v,), torch.float32)[0] for k, v in kwargs.items()}
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> Any:
        if query.shape[-1] > FLASH_HEAD_DIM or kw.get("attn_mask") is not None:
            return F.scaled_dot_product_attention(query, key, value, *args, **kw)
        q, k, v = _cast((query, key, value), self.dtype)
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False)[0]


def _cast(values: Iterable[Any], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(v.to(dtype) if isinstance(v, Tensor) else v for v in values)


def simulate(config: Config, architecture: Architecture) -> SampleCosts:
    """Run the transformer of a configuration on the meta device, forward and backward.

    Raises:
        UserError: LoRA targets that the transformer does not have.
    """
    dtype = DTYPES[config.precision]
    resolution = resolution_of(config, architecture)
    transformer, trainable = _transformer(config, architecture, dtype)
    family = FAMILIES[architecture.family]
    rows = 2 if family.guided(config.sampling.guidance_scale) else 1
    inputs = transformer_inputs(architecture, rows, resolution, config, dtype)
    known = [*transformer.parameters(), *transformer.buffers(), *inputs.values()]

    def forward() -> Tensor:
        return cast(Tensor, transformer(**inputs, return_dict=False)[0])

    with torch.no_grad(), GPUArithmetic(dtype), StorageTracker(known) as inference:
        forward()

    block_bytes = _BlockWatch(transformer, family.blocks)
    with StorageTracker(known) as training, FlopCounterMode(display=False) as flops:
        block_bytes.tracker = training
        with GPUArithmetic(dtype):
            out = forward()
        saved, forward_flops = training.live, flops.get_total_flops()
        out.float().square().mean().backward()
        total_flops, transient = flops.get_total_flops(), training.peak - saved
    block_bytes.remove()
    # a backward pass would recompute outside of the emulated arithmetic: see `training_bytes`
    cast(Any, transformer).enable_gradient_checkpointing()
    with GPUArithmetic(dtype), StorageTracker(known) as checkpointed:
        out = forward()
        saved_checkpointed = checkpointed.live

    return SampleCosts(
        trainable=trainable,
        latent_values=inputs["hidden_states"][0].numel(),
        forward_flops=forward_flops / rows,
        backward_flops=(total_flops - forward_flops) / rows,
        forward_bytes=inference.peak,
        saved_bytes=saved,
        saved_bytes_checkpointed=saved_checkpointed,
        block_bytes=block_bytes.largest,
        train_transient_bytes=transient,
    )


def resolution_of(config: Config, architecture: Architecture) -> int:
    """Side of the images in pixels, as the models' own ``default_resolution`` gives it."""
    if config.sampling.resolution is not None:
        return config.sampling.resolution
    latents = architecture.transformer.get("sample_size", 128)
    return int(latents) * architecture.vae_scale


def _transformer(
    config: Config, architecture: Architecture, dtype: torch.dtype
) -> tuple[nn.Module, int]:
    """The transformer with the adapters of the configuration, and its trained parameters."""
    with torch.device("meta"):
        # diffusers' own `to` warns of parts to keep in float32, of which these models have none
        transformer = nn.Module.to(build_transformer(architecture), dtype).requires_grad_(False)
        if config.model.full_finetune:  # the float32 master weights are counted elsewhere
            return transformer.requires_grad_(True), parameter_count(transformer)
        holder: Any = SimpleNamespace(transformer=transformer, family=architecture.family)
        adapters = build_adapters(holder, config.model, seed=0)
    return transformer, sum(p.numel() for p in adapters.parameters(POLICY).values())


def transformer_inputs(
    architecture: Architecture, rows: int, resolution: int, config: Config, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Empty inputs of a transformer on the meta device, of the shapes that a run gives it."""
    shapes = architecture.inputs(rows, resolution, config.model.max_sequence_length)
    return {n: torch.empty(shape, device="meta", dtype=dtype) for n, shape in shapes.items()}


class _BlockWatch:
    """Notes the most that one transformer block leaves alive."""

    def __init__(self, transformer: nn.Module, lists: Iterable[str]) -> None:
        self.tracker: StorageTracker | None = None
        self.largest = 0
        self._before = 0
        self._hooks: list[Any] = []
        for name in lists:
            for block in getattr(transformer, name):
                self._hooks.append(block.register_forward_pre_hook(self._enter))
                self._hooks.append(block.register_forward_hook(self._leave))

    def _enter(self, *_: Any) -> None:
        self._before = self.tracker.live if self.tracker else 0

    def _leave(self, *_: Any) -> None:
        if self.tracker:
            self.largest = max(self.largest, self.tracker.live - self._before)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


@dataclass(frozen=True)
class DecodeCosts:
    """What decoding costs: FLOPs of one image, and the highest working memory of the batch."""

    flops: float
    bytes: int


def simulate_decode(config: Config, architecture: Architecture, batch: int) -> DecodeCosts:
    """Decode ``batch`` images on the meta device with the configuration's dtype and options."""
    with torch.device("meta"):
        vae: Any = nn.Module.to(build_vae(architecture), DTYPES[config.model.vae_dtype or "fp32"])
        if config.model.vae_tiling:
            vae.enable_tiling()
        if config.model.vae_slicing:
            vae.enable_slicing()
        side = resolution_of(config, architecture) // architecture.vae_scale
        latents = torch.empty(batch, architecture.vae["latent_channels"], side, side)
    latents = latents.to(vae.dtype)
    known = [*vae.parameters(), latents]
    with torch.no_grad(), StorageTracker(known) as memory, FlopCounterMode(display=False) as flops:
        vae.decode(latents, return_dict=False)
    return DecodeCosts(flops.get_total_flops() / batch, memory.peak)
