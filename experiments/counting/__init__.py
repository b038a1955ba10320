"""Counting beyond the pretraining range: accuracy of the base, GRPO and GARDO by count."""
