"""Glow (Kingma & Dhariwal 2018, arXiv 1807.03039): the model, and the layers that serve it alone."""

from flows.glow.model import Glow

__all__ = ["Glow"]
