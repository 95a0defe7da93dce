"""The precision in which everything but a training step is computed."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def evaluation(device_type: str) -> Iterator[None]:
    """Float32 whatever the training precision, and nothing compiled: further graphs would take a minute."""
    with full_float32(device_type), torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """No autocast and no TF32 inside."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
