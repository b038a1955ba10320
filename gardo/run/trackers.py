"""Metrics to TensorBoard and Weights & Biases, beside the JSON lines that every run writes.

Both go through accelerate's trackers and into the run folder; nothing is sent anywhere unless the
user sets ``WANDB_MODE=online``. A tracker that fails in the middle of a run is dropped with a
message: ``metrics.jsonl`` has everything.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from types import TracebackType
from typing import Any

from gardo.config import Config, to_yaml
from gardo.run.folder import RunFolder
from gardo.run.metrics import EVALUATION, read_metrics
from gardo.types import UserError

_PROJECT = "gardo"
_MODES = ("offline", "online", "disabled")


def check_trackers(names: Sequence[str]) -> None:
    """Whether the trackers can be used here; imports none of them.

    Raises:
        UserError: a package is not installed, or ``WANDB_MODE`` is none that W&B has.
    """
    for name in names:
        spec = find_spec(name)
        # without an origin it is a mere folder of that name, such as W&B leaves behind
        if spec is None or spec.origin is None:
            raise UserError(
                f"trackers: '{name}' needs the package '{name}': pip install 'gardo[{name}]'"
            )
    if "wandb" in names and _wandb_mode() not in _MODES:
        raise UserError(
            f"environment variable WANDB_MODE: expected {', '.join(_MODES)}, got '{_wandb_mode()}'"
        )


class Trackers:
    """The trackers of a run, as a context: finished when the block is left."""

    def __init__(
        self, config: Config, folder: RunFolder, start: int, say: Callable[[str], None]
    ) -> None:
        """Start the trackers that ``config.trackers`` names; of several processes only the main.

        Args:
            config: of the run; its keys are recorded.
            folder: of the run; its metrics files have been cut back to ``start`` already.
            start: the first epoch that will be logged. What a stopped run logged of it and of
                later ones counts no longer.
            say: tells the user something.

        Raises:
            UserError: a package is missing, or W&B refuses to start.
        """
        self._say = say
        self._trackers: dict[str, Any] = {}
        if not folder.is_main:
            return
        check_trackers(config.trackers)
        for name in config.trackers:
            start_tracker = _start_tensorboard if name == "tensorboard" else _start_wandb
            try:
                self._trackers[name] = start_tracker(config, folder, start)
            except ImportError as error:  # installed, but not whole
                raise UserError(
                    f"trackers: '{name}' cannot be imported ({error}): pip install 'gardo[{name}]'"
                ) from error
        if self._trackers and start:  # an evaluation that is not repeated
            for row in read_metrics(folder.path / "evaluation.jsonl", ignore_unfinished=True):
                if row["epoch"] >= start:
                    self.log(row, EVALUATION)

    def log(self, row: Mapping[str, Any], prefix: str = "") -> None:
        """Log the numbers of a row of metrics at the step ``row["epoch"]``.

        Args:
            row: an int under ``epoch``; numbers elsewhere, what is none is left out.
            prefix: of the names.
        """
        values = {
            prefix + key: value
            for key, value in row.items()
            if isinstance(value, int | float) and key != "epoch"
        }
        for name in list(self._trackers):
            self._or_leave_out(name, lambda tracker: tracker.log(values, step=row["epoch"]))

    def _or_leave_out(self, name: str, use: Callable[[Any], None]) -> None:
        try:
            use(self._trackers[name])
        except _errors(name) as error:
            del self._trackers[name]
            self._say(f"trackers: {name} failed and is left out from here on: {error}")

    def close(self) -> None:
        """Write what is buffered; closing twice is fine."""
        for name in list(self._trackers):
            self._or_leave_out(name, lambda tracker: tracker.finish())
        self._trackers = {}

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _start_tensorboard(config: Config, folder: RunFolder, start: int) -> Any:
    from accelerate.tracking import TensorBoardTracker

    # events from this step on that are in the folder already are not shown
    tracker = TensorBoardTracker("tensorboard", folder.path, purge_step=start)
    tracker.start()
    text = "\n".join(f"    {line}" for line in to_yaml(config).splitlines())  # as Markdown's code
    tracker.log({"config": text}, step=start)
    return tracker


def _start_wandb(config: Config, folder: RunFolder, start: int) -> Any:
    import wandb
    from accelerate.tracking import WandBTracker

    mode = _wandb_mode()
    # the same after a resume, so that W&B continues the run
    run = hashlib.sha256(f"{folder.path.absolute()} {folder.started}".encode()).hexdigest()[:16]
    try:
        tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT") or _PROJECT,
            id=run,
            resume="allow",
            mode=mode,
            name=os.environ.get("WANDB_NAME") or folder.path.absolute().name,
            dir=str(folder.path),
            # neither what is printed nor the code is anybody's business
            settings=wandb.Settings(console="off", save_code=False, silent=mode == "offline"),
        )
        tracker.start()
        tracker.store_init_configuration(config.model_dump(mode="json"))
    except (wandb.Error, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"trackers: wandb cannot start (WANDB_MODE {mode}): {reason}") from error
    return tracker


def _wandb_mode() -> str:
    return os.environ.get("WANDB_MODE") or "offline"


def _errors(name: str) -> tuple[type[Exception], ...]:
    """What a tracker may raise for reasons that are not the run's."""
    expected = [OSError, RuntimeError, ValueError]
    if name == "wandb":
        import wandb

        expected.append(wandb.Error)
    return tuple(expected)
