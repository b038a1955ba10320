"""Plain data types shared by every layer; nothing here imports another part of gardo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """

    scores: Tensor
    details: dict[str, Tensor] = field(default_factory=dict)


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
