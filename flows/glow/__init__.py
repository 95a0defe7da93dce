"""Glow: the model, and the layers that only it uses.

Kingma, Dhariwal; NeurIPS 2018, arXiv 1807.03039. In this folder "the paper", sections, figures and
equations refer to it, and "authors' code" refers to the repository openai/glow.
"""

from flows.glow.model import Glow

__all__ = ["Glow"]
