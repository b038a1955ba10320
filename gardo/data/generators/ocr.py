"""Prompts that ask for a text in an image, quoted, as the ocr reward needs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gardo.data.generators.vocabulary import check_counts, check_integer
from gardo.rng import generator
from gardo.types import Prompt

SCENES = (
    'A neon sign in the window of a small diner at night, glowing with the words "{}"',
    'A wooden board at the start of a forest trail, carved with "{}"',
    'A close-up of a coffee cup with "{}" printed on its side',
    'A chalkboard in an empty classroom on which someone has written "{}"',
    'The cover of an old leather-bound book, titled "{}" in gold letters',
    'A birthday cake on a kitchen table, decorated with "{}" in icing',
    'A billboard beside a desert highway at sunset that says "{}"',
    'A protester in the rain holding a cardboard sign that reads "{}"',
    'A cotton t-shirt on a hanger with a large print: "{}"',
    'The display of a digital clock radio on a nightstand, showing "{}"',
    'A brick wall in a narrow street, sprayed with colorful graffiti: "{}"',
    'A shop front with a striped awning and the name "{}" above the door',
    'An airport departure board on which every line says "{}"',
    'A vintage travel poster of a mountain lake with the headline "{}"',
    'A brass plate screwed to an office door, engraved "{}"',
    'A message on a beach, "{}", drawn into the wet sand with a stick',
    'A robot in a laboratory, its chest screen displaying "{}"',
    'A hot air balloon over green hills with "{}" across its envelope',
    'A handwritten note, "{}", held to a refrigerator by a magnet',
    'A snow-covered road sign in the fog, just readable: "{}"',
)

WORDS = """
    able above amber anchor apple arrow autumn bakery balloon beacon berry better blue bold brave
    bread bridge bright butter cabin candle canyon castle cedar center change cherry circle city
    classic clear cloud clover coast coffee comet cookie copper coral corner cosmic cotton cozy
    creek crown crystal daily dance dawn delta desert diamond dream eagle early earth echo ember
    empire energy evening express fable falcon family feather festival field flame forest forward
    fresh friday frost future galaxy garden gentle giant ginger glass golden grand grape green
    harbor harvest happy hello hidden honey horizon house humble island ivory jazz jungle kind
    kitchen lake lantern laser lemon liberty light lively local lotus lucky lunar magic maple
    market meadow melody midnight mint modern morning motion mountain music never noble north
    ocean olive open orbit orchid organic pacific palace paper peace pearl pepper pine pioneer
    planet plaza pocket polar power prime quiet radio rain raven record river robin rocket royal
    ruby sail salt saturday savage science secret shadow silent silver simple sky smart solar
    south spark spirit spring station stone storm story studio sugar summer sunday sunny sweet
    table tea temple thunder tiger time today travel tulip turbo ultra union urban valley velvet
    victory village vintage violet wander warm water wave welcome western whisper wild willow
    wind winter wonder wood world yellow yoga young zebra zenith zero
""".split()
TEST_WORDS = tuple(WORDS[::5])  # a test text has no word that a training text has
TRAIN_WORDS = tuple(word for word in WORDS if word not in TEST_WORDS)

STYLES = (str.title, str.upper, str.capitalize)


def ocr_prompts(
    *, split: str = "train", size: int = 1000, seed: int = 0, lengths: Sequence[int] = (1, 2, 3, 4)
) -> list[Prompt]:
    """Different prompts with a text in straight quotes, in random order.

    Args:
        split: ``test`` texts share no word with ``train`` texts.
        size: number of prompts.
        seed: another seed draws other prompts.
        lengths: numbers of words of a text, all equally likely.

    Raises:
        ValueError: a value out of range, or more prompts than can be found.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got '{split}'")
    check_integer("size", size, low=1)
    check_counts("lengths", lengths, low=1)
    if not lengths:
        raise ValueError("lengths: expected at least one number of words, got none")
    words = TRAIN_WORDS if split == "train" else TEST_WORDS
    # texts of the largest length in title and upper case, halved so that drawing stays quick
    limit = len(SCENES) * len(words) ** max(lengths)
    if size > limit:
        raise ValueError(f"size: expected at most {limit} for these lengths, got {size}")
    rng = generator(seed, "prompts", "ocr", split)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=rng))

    texts: dict[str, None] = {}  # a dict keeps the order
    while len(texts) < size:
        count = lengths[draw(len(lengths))]
        text = STYLES[draw(len(STYLES))](" ".join(words[draw(len(words))] for _ in range(count)))
        texts[SCENES[draw(len(SCENES))].format(text)] = None
    return [Prompt(text) for text in texts]
