"""The policy and its frozen companions on one transformer: LoRA adapters, or full copies."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from gardo.checkpointing.state_tensors import sharded_like, to_host, whole
from gardo.config import ModelConfig
from gardo.families import FAMILIES
from gardo.models.base import FlowModel
from gardo.types import UserError

POLICY, REFERENCE, BEHAVIOUR = "policy", "reference", "old"


class LoraAdapters:
    """Several LoRA adapters on one frozen transformer, of which ``policy`` is trained.

    All adapters start equal. Parameters are float32 whatever the base's precision.
    """

    def __init__(
        self, model: FlowModel, config: ModelConfig, seed: int, names: Sequence[str]
    ) -> None:
        from peft import LoraConfig

        lora = config.lora
        targets = list(lora.targets or FAMILIES[model.family].lora_targets)
        peft_config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=targets,
            init_lora_weights="gaussian",
        )
        self.transformer = cast(Any, model.transformer)
        self.peft_config = peft_config
        with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
            torch.manual_seed(seed)
            for name in names:
                try:
                    with warnings.catch_warnings():
                        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                        self.transformer.add_adapter(copy.deepcopy(peft_config), name)
                except ValueError as error:
                    raise UserError(
                        f"model.lora.targets: no module of {type(self.transformer).__name__} "
                        f"matches {targets}"
                    ) from error
        self._layers: list[Any] = [m for m in self.transformer.modules() if _is_lora_layer(m)]
        # by name, not by requires_grad: adding an adapter freezes the others
        self._parameters = {name: dict(self._named(name)) for name in names}
        for parameters in self._parameters.values():
            for parameter in parameters.values():
                parameter.data = parameter.data.float()
        for name in names:
            if name != POLICY:
                self.copy(POLICY, name)
        self.activate(POLICY)

    def _named(self, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.transformer.named_parameters():
            if f".{adapter}." in name and ".lora_" in name:
                yield name.replace(f".{adapter}.", "."), parameter

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, the policy among them."""
        return tuple(self._parameters)

    def parameters(self, adapter: str = POLICY) -> dict[str, nn.Parameter]:
        """Parameters of an adapter by a name that is the same for all adapters."""
        return self._parameters[adapter]

    def take_shards(self, shard: Callable[[nn.Module], Any]) -> None:
        """The transformer was sharded, which replaced its parameters."""
        self._parameters = {name: dict(self._named(name)) for name in self._parameters}

    def activate(self, adapter: str) -> None:
        self.active = adapter
        for layer in self._layers:
            layer.set_adapter(adapter, inference_mode=adapter != POLICY)
        # the policy always asks for gradients: sharding decides by its first forward which
        # parameters are trained, and that may be another adapter's
        for parameter in self._parameters[POLICY].values():
            parameter.requires_grad_(True)

    @contextmanager
    def use(self, adapter: str) -> Iterator[None]:
        """Run the transformer with another adapter inside the block."""
        self.activate(adapter)
        try:
            yield
        finally:
            self.activate(POLICY)

    @torch.no_grad()
    def copy(self, source: str, target: str, keep: float = 0.0) -> None:
        """Overwrite the target adapter's weights: ``keep * target + (1 - keep) * source``."""
        _blend(self.parameters(source), self.parameters(target), keep)

    def state_dict(self, adapter: str) -> dict[str, Tensor]:
        """Detached copies of an adapter's weights, whole; all processes call this."""
        return _copies(self._parameters[adapter])

    @torch.no_grad()
    def load_state_dict(self, adapter: str, state: Mapping[str, Tensor]) -> None:
        """Load weights saved by `state_dict`; ValueError names what does not fit."""
        load_exactly(self._parameters[adapter], state, f"adapter '{adapter}'")

    def export(self, model: FlowModel, folder: str, write: bool = True) -> None:
        """Write the policy as diffusers' ``pytorch_lora_weights.safetensors``.

        All processes call this; ``write`` on the one that writes.
        """
        weights = to_host(self._parameters[POLICY], write)
        if write:
            model.save_lora(folder, weights, _plain_config(self.peft_config))


class FullCopies:
    """Full fine-tuning: the transformer is the policy, each frozen companion a copy of it.

    Master weights are float32, as LoRA parameters are; autocast gives the working precision.
    """

    def __init__(self, model: FlowModel, names: Sequence[str]) -> None:
        self.transformer = cast(Any, model.transformer)
        self._model = model
        self._class = type(self.transformer)  # sharding changes it
        self._sharded = False
        self.transformer.float().requires_grad_(True)
        self._modules = {POLICY: self.transformer}
        self.active = POLICY
        for name in names:
            if name != POLICY:
                self._modules[name] = copy.deepcopy(self.transformer).requires_grad_(False)

    @property
    def names(self) -> tuple[str, ...]:
        """The copies, the policy itself among them."""
        return tuple(self._modules)

    def parameters(self, adapter: str = POLICY) -> dict[str, nn.Parameter]:
        return dict(self._modules[adapter].named_parameters())

    def take_shards(self, shard: Callable[[nn.Module], Any]) -> None:
        """The transformer was sharded; shard its companions, too."""
        self._sharded = True
        for name, module in self._modules.items():
            if name != POLICY:
                shard(module)

    @contextmanager
    def use(self, adapter: str) -> Iterator[None]:
        trained, self.active = self._model.module, adapter
        if adapter != POLICY:
            self._model.module = self._modules[adapter]
        try:
            yield
        finally:
            self._model.module, self.active = trained, POLICY

    @torch.no_grad()
    def copy(self, source: str, target: str, keep: float = 0.0) -> None:
        _blend(self.parameters(source), self.parameters(target), keep)

    def state_dict(self, adapter: str) -> dict[str, Tensor]:
        return _copies(self.parameters(adapter))

    @torch.no_grad()
    def load_state_dict(self, adapter: str, state: Mapping[str, Tensor]) -> None:
        load_exactly(self.parameters(adapter), state, f"weights of '{adapter}'")

    def export(self, model: FlowModel, folder: str, write: bool = True) -> None:
        """Write the policy's transformer as diffusers' own folder; see `LoraAdapters.export`."""
        module = self.transformer
        weights = to_host(module.state_dict(), write) if self._sharded else {}
        if not write:
            return
        if self._sharded:
            with torch.device("meta"):
                module = self._class.from_config(module.config)
            module.load_state_dict(weights, assign=True)
        module.save_pretrained(f"{folder}/transformer")


Adapters = LoraAdapters | FullCopies


def build_adapters(
    model: FlowModel,
    config: ModelConfig,
    seed: int,
    names: Sequence[str] = (POLICY, REFERENCE),
) -> Adapters:
    """The policy and its companions as the configuration asks for them."""
    if config.full_finetune:
        return FullCopies(model, names)
    return LoraAdapters(model, config, seed, names)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(tensor.detach()).clone() for name, tensor in tensors.items()}


def _blend(source: Mapping[str, Tensor], target: Mapping[str, Tensor], keep: float) -> None:
    for name, tensor in target.items():
        if keep:
            tensor.mul_(keep).add_(source[name], alpha=1 - keep)
        else:
            tensor.copy_(source[name])


def load_exactly(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Copy a state dict into parameters of the same names and shapes, or raise ValueError.

    Parameters may be sharded; the state is whole then, or sharded like them.
    """
    if parameters.keys() != state.keys():
        missing, extra = parameters.keys() - state.keys(), state.keys() - parameters.keys()
        raise ValueError(
            f"{what}: {len(missing)} tensors missing and {len(extra)} not expected, "
            f"such as '{min(missing | extra)}'"
        )
    for name, parameter in parameters.items():
        if parameter.shape != state[name].shape:
            raise ValueError(
                f"{what}: '{name}': expected shape {tuple(parameter.shape)}, "
                f"got {tuple(state[name].shape)}"
            )
        parameter.copy_(sharded_like(state[name], parameter))


def _is_lora_layer(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _plain_config(peft_config: Any) -> dict[str, Any]:
    """The PEFT configuration as JSON values."""
    plain = peft_config.to_dict()
    return {k: sorted(v) if isinstance(v, set) else v for k, v in plain.items()}
