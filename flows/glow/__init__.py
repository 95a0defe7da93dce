"""Glow: the model, and the layers that serve it alone.

Kingma, Dhariwal; NeurIPS 2018, arXiv 1807.03039. "The paper" and "section" mean it, and "authors'
code" the repository openai/glow.
"""

from flows.glow.model import Glow

__all__ = ["Glow"]
