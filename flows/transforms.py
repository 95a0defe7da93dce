"""Who else reads a flow's operations: the transforms of torch.func, forward-mode AD, torch.jit.trace.

What a flow writes by hand for speed is not made for them. Where one of them is at work, the same map is computed from
torch's own operations.
"""

import torch
from torch.autograd import forward_ad


def in_transform() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...) or forward-mode AD is at work.

    torch has no public name for either; these are the ones that it asks itself.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def traced() -> bool:
    """Whether a graph of single operations is being made: by torch.compile, torch.export or torch.jit.trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def many_at_once(*grads: torch.Tensor) -> bool:
    """Whether gradients stand for a batch of them: torch.autograd.grad(..., is_grads_batched=True)."""
    return any(torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads)
