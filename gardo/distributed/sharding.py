"""FSDP2: weights, gradients and optimizer state split over the processes, by accelerate and torch.

Outside of a forward or backward every process holds its shards alone; a block's weights are
brought together while it computes, in the dtype in which they are kept, so that the numbers are
those of any other layout.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from gardo.types import UserError

TRUE = ("1", "true", "yes", "on", "y", "t")
FALSE = ("0", "false", "no", "off", "n", "f")

_EXPECTED = {
    "FSDP_VERSION": ("2", "FSDP1 is not supported: accelerate launch --use_fsdp --fsdp_version 2"),
    "FSDP_RESHARD_AFTER_FORWARD": (
        "true",
        "with false the weights that adapters are swapped in would be stale copies",
    ),
    "FSDP_OFFLOAD_PARAMS": ("false", "parameters stay on the device that computes"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "use model.gradient_checkpointing true"),
}


def sharding_plugin(environment: Mapping[str, str]) -> Any:
    """accelerate's plugin if its launcher, or ``ACCELERATE_USE_FSDP=true``, asks for FSDP, or None.

    Raises:
        UserError: for FSDP1, or an option that does not go with this package.
    """
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() not in TRUE:
        return None
    for name, (expected, reason) in _EXPECTED.items():
        got = environment.get(name, expected).lower()
        same = got == expected or any(got in some and expected in some for some in (TRUE, FALSE))
        if not same:
            raise UserError(
                f"environment variable {name}: expected {expected}, got '{got}'; {reason}"
            )
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        # the block classes that the diffusers model itself names
        auto_wrap_policy="transformer_based_wrap",
        # nothing is cast while it is gathered or reduced: autocast works as in other layouts
        mixed_precision_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
        cpu_offload=False,
        activation_checkpointing=False,
        # it would leave text encoders and reward models of all processes but one without weights
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )


def shard_on_cpu(accelerator: Any, plugin: Any) -> None:
    """Switch accelerate to FSDP2 on CPUs, where torch has it and accelerate (1.15) takes DDP."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, ParallelismConfig

    state = accelerator.state
    # as it does itself for a GPU; the first one is copied over the second whenever it is looked at
    PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin
    # torch's own choice of a mesh is a GPU wherever it was built for one
    state.parallelism_config = ParallelismConfig(dp_shard_size=accelerator.num_processes)
    state.device_mesh = state.parallelism_config.get_device_mesh("cpu")


def shard(accelerator: Any, module: Any, optimizer: Any = None) -> Any:
    """Shard a module in place, with the optimizer of its parameters if there is one.

    Returns:
        accelerate's wrapper of the optimizer, or None.
    """
    from accelerate.utils import fsdp2_prepare_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Slicing a flattened dim")
        if optimizer is None:
            fsdp2_prepare_model(accelerator, module)
        else:
            module, optimizer = accelerator.prepare(module, optimizer)
    # also what accelerate keeps together between forward and backward: between two passes
    # parameters are read, written and frozen, which must mean the shards
    module.set_reshard_after_forward(True)
    return optimizer


def refuse_with_sharding(compiled: bool) -> None:
    """UserError for settings that do not go with FSDP."""
    if compiled:
        raise UserError(
            "model.compile: not with FSDP, whose hooks would break each block into many graphs; "
            "expected false"
        )
