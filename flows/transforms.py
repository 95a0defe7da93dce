"""Who else reads a flow's operations: torch.func, forward-mode AD, compilers, batched gradients.

What a flow writes by hand for speed is not made for them. Where one of them is at work, the same
map is computed by torch's own operations.

torch has no public names for most of these questions. The private ones here are those that torch
itself asks; tests/test_interoperability.py fails where one of them is gone.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def in_transform() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...) or forward-mode AD is at work."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def in_trace() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is making a graph."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def are_batched(*gradients: Tensor) -> bool:
    """Whether one of the gradients holds many: torch.autograd.grad(is_grads_batched=True)."""
    return any(map(torch._C._functorch.is_legacy_batchedtensor, gradients))
