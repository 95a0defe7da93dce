"""Failures of a computation that are due to the numbers in a model, not to the code."""

import torch
from lightning.pytorch.utilities import rank_zero_info

# A matrix that cannot be inverted or decomposed, an overflow, a GPU whose memory is full.
FAILURES = (torch.linalg.LinAlgError, ArithmeticError, torch.OutOfMemoryError)


def report_failure(name: str, error: BaseException) -> None:
    """Print in one line what could not be computed, and why; the run continues.

    A missing picture is no reason to end a run. If weights have grown until a layer's matrix is
    singular, training steps are skipped as not finite, and too many of those end the run.

    name: what could not be computed, such as "samples at T=1". error: one of FAILURES.
    """
    reason = str(error).partition("\n")[0]
    rank_zero_info(f"{name} cannot be computed: {reason}")
