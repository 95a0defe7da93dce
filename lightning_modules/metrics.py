"""Metrics and the precision they are taken in."""

import contextlib
from collections.abc import Iterator

import torch
from torchmetrics import MeanMetric


def image_mean() -> MeanMetric:
    """A mean over images, exact with uneven ranks (Lightning's `sync_dist` is not); never waits for the device."""
    return MeanMetric(nan_strategy="disable")


@contextlib.contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """No autocast and no TF32 inside: evaluation is float32 whatever the training precision."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
