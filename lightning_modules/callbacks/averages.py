"""Averages of the weights over training, which are tested in the place of the weights themselves."""

from lightning.pytorch.callbacks import EMAWeightAveraging


class Averages(EMAWeightAveraging):
    """Exponential moving averages of the weights: w_avg = decay w_avg + (1 - decay) w after every step.

    Validation, checkpoints and the test take the averages. Buffers, such as batch norm's running
    statistics, are not averaged.

    decay: in [0, 1); with 1 the averages would never leave the first weights. ValueError: it is
    out of this range.
    """

    def __init__(self, decay: float) -> None:
        if isinstance(decay, bool) or not 0 <= decay < 1:
            raise ValueError(
                f"ema.decay={decay} is out of range: give 0 or more and less than 1, such as 0.999, "
                "or null for no average"
            )
        super().__init__(use_buffers=False, decay=decay)

    @property
    def state_key(self) -> str:
        """The key of Lightning's own callback, under which earlier checkpoints have its state."""
        return EMAWeightAveraging.__qualname__
