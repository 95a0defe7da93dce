"""Memory for time: what a part of a flow would keep for the backward pass is made again there."""

import contextlib
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute(flow: nn.Module) -> None:
    """Let every layer that can, those with an attribute `recompute`, keep no more than its inputs."""
    for module in flow.modules():
        if hasattr(module, "recompute"):
            module.recompute = True


def recomputed(function: Callable, module: nn.Module, *inputs, on: bool):
    """function(module, *inputs); with `on` only the inputs are kept for the backward pass.

    Gradients are the same to the bit. Batch norms of `module` see the batch again, and must not count it twice.
    """
    if not on or not torch.is_grad_enabled():
        return function(module, *inputs)
    return checkpoint(
        function,
        module,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing in a flow is random
        context_fn=lambda: (contextlib.nullcontext(), _RunningAveragesKept(module)),
    )


class _RunningAveragesKept:
    """Puts back what batch norms have counted, around every further run: a graph may be gone through twice.

    Such a run may end before it has reached all of them.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm) and m.training]
        self.buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var, norm.num_batches_tracked)]
        self.before = [buffer.clone() for buffer in self.buffers]

    def __exit__(self, *error) -> None:
        for buffer, value in zip(self.buffers, self.before, strict=True):
            buffer.data.copy_(value)  # autograd holds them too, and would take a change for one that matters
