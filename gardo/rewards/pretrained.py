"""Loads pretrained models, with errors that say what to do next."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gardo.rewards.preprocess import ImageTransform, transform_from_config
from gardo.types import UserError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

T = TypeVar("T")
_shared: dict[Hashable, Any] = {}
_shared_lock = threading.RLock()


def shared(key: Hashable, load: Callable[[], T]) -> T:
    """What ``load`` returned when it was first called for this key; kept for the process' life."""
    with _shared_lock:
        if key not in _shared:
            _shared[key] = load()
        value: T = _shared[key]
        return value


def compute_dtype(
    dtype: torch.dtype | str | None, device: torch.device | str, preferred: str = "fp16"
) -> torch.dtype:
    """The precision to compute in: as asked, or else ``preferred`` on CUDA and fp32 on CPU.

    Args:
        dtype: a torch dtype, or fp32, fp16, bf16.
        device: where it computes.
        preferred: fp16 resolves scores eight times finer than bf16; bf16 is for models whose
            activations leave the range of fp16.

    Raises:
        UserError: another dtype.
    """
    if dtype is None:
        dtype = preferred if torch.device(device).type == "cuda" else "fp32"
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise UserError(f"dtype: expected fp32, fp16 or bf16, got {dtype!r}")


def load_pretrained(
    class_name: str,
    model_type: str,
    path: str,
    dtype: torch.dtype,
    revision: str | None = None,
    **options: Any,
) -> Any:
    """Load a transformers model whole: every weight must come from the checkpoint.

    Args:
        class_name: class of transformers.
        model_type: what the checkpoint's ``config.json`` must say.
        path: hub id or folder.
        dtype: of the weights.
        revision: hub revision.
        options: further arguments of ``from_pretrained``.

    Raises:
        UserError: a missing folder or file, a gated repository, another architecture, missing
            weights.
    """
    import transformers

    path = check_path(path)
    transformers.utils.logging.disable_progress_bar()
    config = load_part("AutoConfig", path, revision)
    if config.model_type != model_type:
        raise UserError(
            f"'{path}': expected a checkpoint of type '{model_type}', got '{config.model_type}'"
        )
    model, info = load_part(
        class_name,
        path,
        revision,
        config=config,
        dtype=dtype,
        output_loading_info=True,
        **options,
    )
    absent = sorted({*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])})
    if absent:
        raise UserError(
            f"'{path}': the checkpoint lacks {len(absent)} of the weights of {class_name}, such as "
            f"'{absent[0]}'; download it again or give the model that this reward needs"
        )
    return model


def load_part(class_name: str, path: str, revision: str | None = None, **options: Any) -> Any:
    """``transformers.<class_name>.from_pretrained`` with errors that say what to do next.

    Raises:
        UserError: a missing folder or file, a gated repository, or files that cannot be read.
    """
    import transformers

    path = check_path(path)
    if class_name.startswith("Auto"):  # a checkpoint may name code of its own; it is never run
        options["trust_remote_code"] = False
    return _told(
        path,
        class_name,
        lambda: getattr(transformers, class_name).from_pretrained(
            path, revision=revision, local_files_only=Path(path).is_dir(), **options
        ),
    )


def load_transform(path: str, revision: str | None = None, as_bytes: bool = True) -> ImageTransform:
    """The image preprocessing of a checkpoint, from its ``preprocessor_config.json``.

    Raises:
        UserError: no such file, or a step in it that is not supported.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    path = check_path(path)
    config, _ = _told(
        path,
        "preprocessor_config.json",
        lambda: ImageProcessingMixin.get_image_processor_dict(
            path, revision=revision, local_files_only=Path(path).is_dir()
        ),
    )
    try:
        return transform_from_config(config, as_bytes)
    except ValueError as error:
        raise UserError(f"'{path}': preprocessor_config.json: {error}") from None


def load_file(path: str, repository: str, name: str, revision: str | None = None) -> Path:
    """A single weight file: ``path`` itself, ``name`` in the folder ``path``, or from the hub.

    Args:
        path: a file, a folder that holds ``name``, or a hub id.
        repository: the hub id that publishes the file, for the message.
        name: file name.
        revision: hub revision.

    Raises:
        UserError: no such file, or the hub refuses it.
    """
    local = Path(os.path.expanduser(path))
    if local.is_file():
        return local
    if local.is_dir() or _looks_local(path):
        if (local / name).is_file():
            return local / name
        what = f"no '{name}' in it" if local.is_dir() else "no such file or folder"
        raise UserError(
            f"'{path}': {what}; fetch it with `hf download {repository} {name} --local-dir FOLDER`"
        )
    from huggingface_hub import hf_hub_download

    return Path(_told(path, name, lambda: hf_hub_download(path, name, revision=revision)))


def load_folder(path: str, revision: str | None = None) -> Path:
    """The folder of a whole repository: ``path`` itself, or fetched from the hub (no code in it).

    Raises:
        UserError: no such folder, or the hub refuses it.
    """
    path = check_path(path)
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.bin", "*.model"]
    return Path(
        _told(
            path,
            "the repository",
            lambda: snapshot_download(path, revision=revision, allow_patterns=wanted),
        )
    )


def load_shards(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder in transformers' format, in one file or several.

    Raises:
        UserError: no weights, a file of the index is missing, or one cannot be read.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise UserError(f"'{index}' is no index of weights: {error!r}") from None
        elif (folder / name).is_file():
            files = [name]
        else:
            continue
        strange = [file for file in files if Path(str(file)).name != file]
        if strange:
            raise UserError(f"'{index}': expected names of files beside it, got {strange[0]!r}")
        absent = [file for file in files if not (folder / file).is_file()]
        if absent:
            raise UserError(f"'{folder}': no '{absent[0]}' in it, which its index names")
        state: dict[str, Tensor] = {}
        for file in files:
            state.update(load_weights(folder / file))
        return state
    raise UserError(
        f"'{folder}': no model.safetensors or pytorch_model.bin in it, whole or in parts"
    )


def load_weights(file: Path) -> dict[str, Any]:
    """The contents of a ``.safetensors`` or ``.pt``/``.pth`` file, on the CPU; runs no code in it.

    Raises:
        UserError: not such a file, or one that holds more than tensors and plain containers.
    """
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from safetensors.torch import load_file as load_safetensors

    try:
        if file.suffix == ".safetensors":
            state: Any = load_safetensors(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"'{file}' cannot be read as weights: {reason}") from None
    if not isinstance(state, dict):
        raise UserError(f"'{file}': expected a dictionary of tensors, got {type(state).__name__}")
    return state


def load_state(
    model: torch.nn.Module, state: dict[str, Tensor], file: Path, assign: bool = False
) -> None:
    """Fill a module with a state dict in which every key has its place and none is missing.

    Args:
        model: what is filled.
        state: the weights.
        file: where they come from, for the message.
        assign: let the module have the tensors themselves instead of copies of their values.

    Raises:
        UserError: unknown or missing keys, or another shape.
    """
    expected = model.state_dict()
    for problem, keys in (
        ("holds unknown", state.keys() - expected.keys()),
        ("lacks", expected.keys() - state.keys()),
    ):
        if keys:
            raise UserError(
                f"'{file}' {problem} weights: '{min(keys)}'"
                + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
            )
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise UserError(
                f"'{file}': '{key}': expected shape {list(expected[key].shape)}, "
                f"got {list(tensor.shape)}"
            )
    model.load_state_dict(state, assign=assign)


def check_path(path: str) -> str:
    """Expand ``~``; refuse what is meant as a folder and is none.

    Raises:
        UserError: no such folder.
    """
    expanded = os.path.expanduser(path)
    if _looks_local(path) and not Path(expanded).is_dir():
        raise UserError(
            f"'{path}': no such folder (expected a checkpoint folder or a hub id, OWNER/NAME)"
        )
    return expanded


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") != 1


def _told(path: str, part: str, load: Callable[[], T]) -> T:
    """Call ``load``; turn what can go wrong with files and the hub into one message."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        chain = _causes(error)
        if any(isinstance(cause, GatedRepoError) for cause in chain):
            raise UserError(
                f"'{path}' is gated: accept its licence at https://huggingface.co/{path} and log "
                "in with `hf auth login`"
            ) from None
        if any(isinstance(cause, RepositoryNotFoundError) for cause in chain):
            raise UserError(
                f"'{path}': no such folder, and no such repository on the hub that you may read "
                "(for a private one, log in with `hf auth login`)"
            ) from None
        reason = str(error).strip().split("\n")[0]
        hint = (
            "is the folder complete, and of that model?"
            if Path(path).is_dir()
            else f"check the connection, or fetch it with `hf download {path} --local-dir FOLDER` "
            "where there is one"
        )
        raise UserError(f"'{path}': {part} cannot be loaded ({hint}): {reason}") from error


def _causes(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
