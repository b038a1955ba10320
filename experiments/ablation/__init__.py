"""Ablation on the embedded image task: every method, over seeds and KL coefficients."""
