"""Rewards as an HTTP service: ``python -m gardo.rewards.serve --rewards geneval,ocr``."""
