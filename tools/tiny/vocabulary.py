"""The small vocabulary of the embedded model: its tokenizers and fixed word embeddings.

The tokenizers are the real classes of SD3 with a vocabulary of the grammar's words. Word embeddings
are fixed and random, except that the number words lie in order along one direction, so that counts
never seen in pretraining ("six" to "nine") still mean something.
"""

from __future__ import annotations

import string

import torch
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

from gardo.tiny.scenes import COLORS, NUMBERS, SHAPES

WORDS = (*NUMBERS, *COLORS, *SHAPES, *(f"{shape}s" for shape in SHAPES))
# Words that may stand around a prompt without meaning anything here.
FILLERS = (
    *("a", "an", "the", "some", "of", "on", "with"),
    *("photo", "image", "picture", "draw", "grey"),
)
MAX_TOKENS = 8  # of the CLIP tokenizers; a prompt of the grammar needs five

CLIP_BOS, CLIP_EOS, CLIP_PAD, CLIP_UNK = "<|startoftext|>", "<|endoftext|>", "<|pad|>", "<|unk|>"
T5_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's mark of a word's beginning


def clip_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer: a word of the vocabulary is one token, others fall into letters."""
    pieces = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    merges: list[tuple[str, str]] = []
    for word in (*WORDS, *FILLERS):
        parts = _apply_merges([*word[:-1], word[-1] + "</w>"], merges)
        left = parts[0]
        for right in parts[1:]:
            merges.append((left, right))
            left += right
            pieces.append(left)
    tokens = [*dict.fromkeys(pieces), CLIP_BOS, CLIP_EOS, CLIP_PAD, CLIP_UNK]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        bos_token=CLIP_BOS,
        eos_token=CLIP_EOS,
        pad_token=CLIP_PAD,
        unk_token=CLIP_UNK,  # not the end token: the text encoder pools at the first end token
        model_max_length=MAX_TOKENS,
    )


def t5_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer: a word of the vocabulary is one token, another word is ``<unk>``."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab = special + [(T5_SPACE + word, -1.0) for word in (*WORDS, *FILLERS)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def _apply_merges(parts: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of one word: merge pairs in order of rank, each wherever it occurs."""
    for left, right in merges:
        index = 0
        while index < len(parts) - 1:
            if (parts[index], parts[index + 1]) == (left, right):
                parts = [*parts[:index], left + right, *parts[index + 2 :]]
            index += 1
    return parts


def word_embeddings(words: list[str], dim: int, generator: torch.Generator) -> Tensor:
    """Fixed embeddings of the given vocabulary entries.

    Every entry is standard normal. Number words share a common part and are shifted along one
    direction by their rank, plus a smaller part of their own.

    Args:
        words: entries in vocabulary order, without marks of word beginning or end.
        dim: width of an embedding.
        generator: CPU generator.

    Returns:
        ``[len(words), dim]`` float32.
    """
    table = torch.randn(len(words), dim, generator=generator)
    shared, direction = torch.randn(2, dim, generator=generator)
    ranks = torch.linspace(-1.5, 1.5, len(NUMBERS))
    for row, word in enumerate(words):
        if word in NUMBERS:
            table[row] = 0.5 * shared + ranks[NUMBERS.index(word)] * direction + 0.4 * table[row]
    return table
