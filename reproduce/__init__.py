"""One script for each experiment, and in `experiment` what all scripts share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flows.base import FlowModel


def load(folder: str | Path) -> FlowModel:
    """The trained flow of a run folder (or of one checkpoint file), in eval mode on the CPU.

    >>> flow = load("outputs/realnvp_cifar10/20261122-231500-ab12")  # doctest: +SKIP
    >>> images = flow.sample(16, temperature=0.7)  # doctest: +SKIP
    """
    from reproduce.run_folder import load_flow

    return load_flow(folder)
