"""Drop-in replacements for functions of other diffusion-RL codebases."""
