"""The precision of everything but training steps."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def evaluation(device_type: str) -> Iterator[None]:
    """Compute in float32, whatever the training precision, and without compiled graphs.

    Evaluation would need compiled graphs of its own, which would take a minute to compile.

    device_type: "cpu" or "cuda".
    """
    with full_float32(device_type), torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Compute without autocast and without TF32."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    cudnn = torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.backends.cudnn.allow_tf32 = cudnn
