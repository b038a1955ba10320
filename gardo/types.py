"""Plain data types shared by every layer; nothing here imports another part of gardo."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class UserError(Exception):
    """A mistake that the user can mend: reported as one message, without a traceback.

    Entry points print ``str(error)`` and exit with code 2.
    """


@dataclass(frozen=True)
class Prompt:
    """One prompt with the metadata that rule-based rewards need (GenEval records, counts, ...).

    ``origin`` says where it was read, such as "train.txt, line 3", for error messages.
    """

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    origin: str = field(default="", compare=False)


@dataclass
class RewardOutput:
    """What a reward returns for a batch.

    Attributes:
        scores: ``[B]`` float32. NaN marks a sample that could not be scored; it is masked
            through shaping, never counted as 0.
        details: optional further measurements, each ``[B]``; metrics and reports show their means
            as ``reward/<name>/<detail>/mean``.
        sigma: ``[B]`` float32 from 0 on, the standard deviation that the reward itself states for
            its scores, in their unit; NaN where it is unknown or the score is missing. None: the
            reward states none. Metrics show its mean as ``reward/<name>/sigma``.
    """

    scores: Tensor
    details: dict[str, Tensor] = field(default_factory=dict)
    sigma: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> RewardOutput:
        """The output with ``function`` applied to each of its tensors."""
        return RewardOutput(
            function(self.scores),
            {name: function(values) for name, values in self.details.items()},
            None if self.sigma is None else function(self.sigma),
        )


@dataclass
class PromptEmbeds:
    """Conditioning of a batch of prompts: named tensors ``[B, ...]``.

    Models name the tensors as their transformer does (``encoder_hidden_states``, ...).
    """

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def select(self, rows: Tensor | Sequence[int] | slice) -> PromptEmbeds:
        """Return the given rows (an index tensor, a list of ints or a slice)."""
        index = list(rows) if isinstance(rows, Sequence) else rows
        return PromptEmbeds({name: tensor[index] for name, tensor in self.tensors.items()})
