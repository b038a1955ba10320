"""What the fixtures of the tiny pipeline and the tests that use them share."""

from __future__ import annotations

PROMPTS = ("three red circles", "two blue squares")
