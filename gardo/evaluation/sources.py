"""What a contender's path stands for, and which weights exactly lie there."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gardo.config import Config, ModelConfig, load_config
from gardo.models.loading import pipeline_class, resolve_path
from gardo.types import UserError

LORA_FILE = "pytorch_lora_weights.safetensors"
BUILTIN = "builtin:tiny"

Kind = Literal["pipeline", "lora", "transformer"]


@dataclass(frozen=True)
class Source:
    """What was found at a path.

    Attributes:
        given: as the user wrote it.
        kind: a whole pipeline; LoRA weights, or a transformer, for a base model.
        folder: of the LoRA file or of the transformer; None for a pipeline.
        model: path and revision of a pipeline; None otherwise.
        run: configuration of the run that it belongs to.
        name: what tables call it, if nobody says otherwise.
    """

    given: str
    kind: Kind
    name: str
    folder: Path | None = None
    model: ModelConfig | None = None
    run: Config | None = None


def find_source(text: str, option: str = "--runs") -> Source:
    """Find out what the path given to an option is.

    A run folder (also by its ``export``), a folder with LoRA weights, a pipeline folder, a folder
    with a ``transformer``, ``builtin:tiny``, or a hub id of a pipeline or LoRA weights, with
    ``@REVISION`` if one is meant.

    Raises:
        UserError: nothing of this kind is there.
    """
    if text == BUILTIN:
        return Source(text, "pipeline", "tiny", model=ModelConfig(path=text))
    if not text.strip() or not text.isprintable():
        raise UserError(f"{option}: expected the path of a folder or a hub id, got {text!r}")
    try:
        path = Path(text).expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long; of a user that is not there
        raise UserError(f"{option} '{text}': {error}") from None
    if is_folder:
        return _find_in_folder(text, path, option)
    if path.exists() or not _may_be_hub_id(text, path):
        raise UserError(_nothing(text, path, option))
    return _find_on_hub(text, option)


def _find_in_folder(text: str, path: Path, option: str) -> Source:
    run = path
    if path.name == "export" and (path.parent / "config.yaml").is_file():
        run = path.parent
    if (run / "config.yaml").is_file():
        return _run_folder(text, run, option)
    name = path.resolve().name
    if (path / "model_index.json").is_file():
        return Source(text, "pipeline", name, model=ModelConfig(path=str(path)))
    found = _weights(path)
    if found is None:
        raise UserError(
            f"{option} '{text}': expected a run folder (config.yaml and export/), a LoRA export "
            f"({LORA_FILE}), a pipeline folder (model_index.json) or a folder with transformer/, "
            "found none of these in it"
        )
    return Source(text, found[0], name, folder=found[1])


def _run_folder(text: str, run: Path, option: str) -> Source:
    config = load_config(str(run.absolute() / "config.yaml"), to_evaluate=True)
    found = _weights(run / "export")
    if found is None:
        raise UserError(
            f"{option} '{text}': the run has no export yet (expected export/{LORA_FILE} or "
            f"export/transformer); finish it with python -m gardo.train --resume {run}"
        )
    return Source(text, found[0], run.resolve().name, folder=found[1], run=config)


def _weights(folder: Path) -> tuple[Kind, Path] | None:
    if (folder / LORA_FILE).is_file():
        return "lora", folder
    if (folder / "transformer" / "config.json").is_file():
        return "transformer", folder / "transformer"
    return None


def _may_be_hub_id(text: str, path: Path) -> bool:
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        return False
    # a wrong name beside runs is a typing error, not a question for the hub
    return not any(path.parent.glob("*/config.yaml"))


def _nothing(text: str, path: Path, option: str) -> str:
    if path.is_file():
        return f"{option} '{text}': expected a folder or a hub id, got a file"
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    hint = f"; did you mean '{path.parent / near[0]}'?" if near else ""
    return (
        f"{option} '{text}': no such folder{hint} (expected a run folder, a LoRA export, a "
        f"pipeline folder, a hub id such as stabilityai/stable-diffusion-3.5-medium, or {BUILTIN})"
    )


def _find_on_hub(text: str, option: str) -> Source:
    repository, _, revision = text.partition("@")
    name = repository.rsplit("/", 1)[-1]
    model = ModelConfig(path=repository, revision=revision or None)
    if hub_file(model, "model_index.json") is None:
        lora = hub_file(model, LORA_FILE)
        if lora is not None:
            return Source(text, "lora", name, folder=lora.parent)
        try:
            pipeline_class(repository, model)  # says what is wrong
        except UserError as error:
            raise UserError(f"{option} '{text}': {error}") from None
    return Source(text, "pipeline", name, model=model)


def hub_file(model: ModelConfig, name: str) -> Path | None:
    """A file of a hub repository, downloaded if need be; None if it cannot be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(model.path, name, revision=model.revision))
    except (HfHubHTTPError, OSError, ValueError):
        return None


def model_file(model: ModelConfig, name: str) -> Path | None:
    """A small file of a pipeline, in its folder or on the hub; None if it is not there."""
    path = Path(resolve_path(model.path))
    if path.is_dir():
        return path / name if (path / name).is_file() else None
    return hub_file(model, name)


def model_digest(model: ModelConfig) -> str:
    """What a pipeline's weights are: a hash of its files, or the commit of a hub repository.

    Raises:
        UserError: it is missing or no pipeline.
    """
    path = Path(resolve_path(model.path))
    pipeline_class(str(path) if path.is_dir() else model.path, model)  # one clear message
    index = model_file(model, "model_index.json")
    if index is None:
        raise UserError(f"model.path '{model.path}': model_index.json is gone")
    if not path.is_dir():  # the snapshot of a commit is called by its hash
        return f"{model.path}@{index.parent.name}"
    parts = [name for name in _json(index) if (path / name).is_dir()]
    files = [index, *(f for name in parts for f in (path / name).rglob("*") if f.is_file())]
    return _digest(path, files)


def weights_digest(source: Source) -> str:
    """A hash of the files of LoRA weights or of a transformer."""
    if source.folder is None:
        raise ValueError(f"source: expected LoRA weights or a transformer, got {source.kind}")
    if source.kind == "lora":
        return _digest(source.folder, [source.folder / LORA_FILE])
    return _digest(source.folder, [f for f in source.folder.rglob("*") if f.is_file()])


def _digest(root: Path, files: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for file in sorted(files):
        part = hashlib.sha256()
        try:
            with open(file, "rb") as data:
                while chunk := data.read(1 << 22):
                    part.update(chunk)
        except OSError as error:
            raise UserError(f"'{file}' cannot be read: {error.strerror}") from None
        whole.update(f"{file.relative_to(root).as_posix()}\0{part.hexdigest()}\n".encode())
    return whole.hexdigest()


COMPARED = ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")


def check_same_base(source: Source, model: ModelConfig, base: ModelConfig) -> None:
    """Refuse a whole pipeline, or a transformer, that has another shape or schedule than the base.

    Args:
        source: a pipeline or a transformer.
        model: of the pipeline; for a transformer, the base.
        base: what it is compared with.

    Raises:
        UserError: names the file and the key that differ.
    """
    pairs: list[tuple[str, Path | None]]
    if source.kind == "transformer" and source.folder is not None:
        pairs = [("transformer/config.json", source.folder / "config.json")]
    else:
        kinds = [pipeline_class(resolve_path(m.path), m) for m in (model, base)]
        if kinds[0] != kinds[1]:
            raise _other_base(source, base, f"a {kinds[0]} against a {kinds[1]}")
        pairs = [(name, model_file(model, name)) for name in COMPARED]
    for name, mine in pairs:
        theirs = model_file(base, name)
        ours, others = _plain(mine), _plain(theirs)
        for key in sorted(ours.keys() | others.keys()):
            if ours.get(key) != others.get(key):
                raise _other_base(
                    source, base, f"{name}: {key} {ours.get(key)!r} against {others.get(key)!r}"
                )


def _other_base(source: Source, base: ModelConfig, difference: str) -> UserError:
    return UserError(
        f"--runs '{source.given}': expected contenders of one base model, '{base.path}', got "
        f"{difference}; evaluate models of another kind on their own"
    )


def _plain(path: Path | None) -> Mapping[str, Any]:
    """A component's configuration without notes on where it comes from."""
    if path is None:
        return {}
    return {key: value for key, value in _json(path).items() if not key.startswith("_")}


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model file '{path}' cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"model file '{path}': expected an object, got {type(data).__name__}")
    return data
