"""Data-dependent initialisation: before training, and never again."""

import math

import lightning.pytorch as L

from flows.normalization import uninitialized

PIXELS = 256 * 32**2  # of the first batch: 256 images of 32x32 (Glow's authors' code, `n_batch_init`), 11 of 160x160


class Initialization(L.Callback):
    """Sets the flow's ActNorms from a first batch that depends on the seed alone, so that it is the same on every rank.

    Nothing to do where a run goes on: `fit` has loaded its weights by then. Has to stand before the callback that
    averages weights, which copies them in the same hook.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and uninitialized(pl_module.flow):
            n = math.ceil(PIXELS / math.prod(pl_module.flow.shape[1:]))
            pl_module.initialize(trainer.datamodule.initialization_batch(n))
            if uninitialized(pl_module.flow):
                raise RuntimeError(
                    f"{type(pl_module.flow).__name__}: a layer does not hand `initialize` on to its parts"
                )
