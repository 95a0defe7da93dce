"""One script for each experiment, and in `experiment` what all scripts share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reproduce.model import TrainedModel


def load(model: str | Path) -> TrainedModel:
    """Load a trained model onto the CPU, in eval mode.

    model: the folder of a run, an exported folder, a checkpoint file, or the name of a recorded run
        whose weights were kept, such as "glow_cifar10/cpu-seed0".

    ConfigError, ValueError or FileNotFoundError, one line: there is nothing to load.

    >>> model = load("outputs/realnvp_cifar10/20261122-231500-ab12")  # doctest: +SKIP
    >>> images = model.sample(16, temperature=0.7)  # doctest: +SKIP
    """
    from reproduce.model import load_model

    return load_model(model)
