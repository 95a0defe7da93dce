"""Data-dependent initialisation: before training, and never again."""

import math

import lightning.pytorch as L

from lightning_modules.objective import Objective

PIXELS = (
    256 * 32**2
)  # of the first batch: 256 images of 32x32 (Glow's authors' code, `n_batch_init`), 11 of 160x160


class Initialization(L.Callback):
    """Sets what depends on data from a first batch, which depends on the seed alone and so is the same on every rank.

    Nothing to do where a run goes on: `fit` has loaded its weights by then. Has to stand before the callback that
    averages weights, which copies them in the same hook.
    """

    def setup(self, trainer: L.Trainer, pl_module: Objective, stage: str) -> None:
        if stage == "fit" and pl_module.needs_initialization():
            # The weights are still on the CPU, and so is this batch: Lightning moves them after `setup`.
            pl_module.initialize(trainer.datamodule.initialization_batch(n_data(pl_module.shape)))
            if pl_module.needs_initialization():
                raise RuntimeError(
                    f"{pl_module.model_name}: a layer does not hand `initialize` on to its parts"
                )


def n_data(shape: tuple[int, ...] | None) -> int:
    """How many data of a shape the first batch has: PIXELS, whatever an image's size; 256 where it is not fixed."""
    return 256 if shape is None or None in shape else math.ceil(PIXELS / math.prod(shape[1:]))
