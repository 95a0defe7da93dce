"""Whether torch.func, forward-mode AD, a compiler or a batched gradient is processing a flow.

The parts of a flow that are written by hand for speed do not support these. While one of them is
active, the flow computes the same map by torch's own differentiable operations.

torch has no public functions for most of these questions, so private ones are used here, as torch
itself does. tests/test_interoperability.py fails if one of them disappears.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def in_transform() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...) or forward-mode AD is active."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def in_trace() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is recording a graph."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def are_batched(*gradients: Tensor) -> bool:
    """Whether one of the gradients is a batch of gradients (is_grads_batched of autograd.grad)."""
    return any(map(torch._C._functorch.is_legacy_batchedtensor, gradients))
