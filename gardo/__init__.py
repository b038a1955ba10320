"""GARDO: online RL fine-tuning of text-to-image flow models without reward hacking.

Importing the package is light; its modules import torch and diffusers when they are needed.
"""

__version__ = "0.1.0"
