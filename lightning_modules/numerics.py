"""Computations that fail because of the numbers in a model, not because of the code."""

import torch
from lightning.pytorch.utilities import rank_zero_info

# A matrix that cannot be inverted or decomposed, an overflow, and a GPU whose memory is full.
FAILURES = (torch.linalg.LinAlgError, ArithmeticError, torch.OutOfMemoryError)


def say_failed(what: str, error: BaseException) -> None:
    """Say in one line what could not be computed, and why; the run goes on.

    A picture is not worth a run. Weights that have grown until a layer's matrix is singular are
    counted where steps are not finite, which ends a run with a message of its own.

    what: the beginning of the line, such as "samples at T=1". error: one of FAILURES.
    """
    reason = str(error).partition("\n")[0]
    rank_zero_info(f"{what} cannot be computed: {reason}")
