"""Data-dependent initialisation, once before training."""

import math

import lightning.pytorch as L

from lightning_modules.objective import as_objective, data_of

# Pixels in the first batch: 256 images of 32x32, as `n_batch_init` in the code of Glow's authors,
# or 64 images of 64x64.
PIXELS = 256 * 32**2
# Of larger images, so that an ActNorm of 1x1 pixels, after many squeezes, sees enough values.
LEAST_IMAGES = 32


class Initialization(L.Callback):
    """Sets the parameters that depend on data from a first batch, before training.

    The batch depends only on the seed, so it is the same on every rank. In a resumed run nothing is
    done, since `fit` has loaded the weights by then. The callback has to come before the one that
    averages weights, which copies them in the same hook.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Initialise the objective, unless it is initialised.

        Raises RuntimeError: a layer of the model does not pass `initialize` on to its parts.
        """
        objective = as_objective(pl_module)
        if stage != "fit" or not objective.needs_initialization():
            return
        # Lightning moves the weights to a GPU after `setup`; until then they and the data are on
        # the CPU.
        objective.initialize(data_of(trainer).initialization_batch(n_data(objective.shape)))
        if objective.needs_initialization():
            raise RuntimeError(
                f"{objective.model_name}: a layer does not pass `initialize` on to its parts"
            )


def n_data(shape: tuple[int | None, ...] | None) -> int:
    """How many data of shape (C, H, W) the first batch has: PIXELS pixels, and LEAST_IMAGES.

    It is 256 if the size is not fixed.

    >>> n_data((3, 32, 32)), n_data((3, 160, 160)), n_data((3, None, None))
    (256, 32, 256)
    """
    if shape is None:
        return 256
    sides = [side for side in shape[1:] if side is not None]
    if None in shape:
        return 256
    return max(LEAST_IMAGES, math.ceil(PIXELS / math.prod(sides)))
