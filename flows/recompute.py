"""Memory for time: what a part of a flow would keep for the backward pass is made again there."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute(flow: nn.Module) -> None:
    """Let every layer that can, those with an attribute `recompute`, keep no more than its inputs."""
    for module in flow.modules():
        if hasattr(module, "recompute"):
            module.recompute = True


def recomputed(function: Callable, module: nn.Module, *inputs, on: bool):
    """function(module, *inputs); with `on` only the inputs, and what is `reused`, are kept for the backward pass.

    The function gives a tuple. Gradients are the same to the bit. Batch norms of `module` see the batch again, and must
    not count it twice.
    """
    if not on or not torch.is_grad_enabled():
        return function(module, *inputs)
    tape: list[Tensor] = []
    outputs = checkpoint(
        function,
        module,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing in a flow is random
        context_fn=lambda: (_at(Reuse(tape, recorded=False)), _Again(module, tape)),
    )
    return Kept.apply(tape, len(outputs), *outputs, *tape) if tape else outputs


@dataclass
class Reuse:
    """What a region that is run again need not make again, in its order, and whether that is known yet."""

    tape: list[Tensor]
    recorded: bool


_region: Reuse | None = None


def reused(make: Callable[[Tensor | None], Tensor]) -> Tensor:
    """make(None); where a region runs again make(what it gave the first time), for its gradients alone.

    For what is small and took long. In compiled code always the first.
    """
    if torch.compiler.is_compiling() or _region is None:
        return make(None)
    if _region.recorded:
        return make(_region.tape.pop(0))
    made = make(None)
    _region.tape.append(made.detach())
    return made


class Kept(torch.autograd.Function):
    """The outputs of a region as they are; its graph, and nothing else, holds what the tape held."""

    @staticmethod
    def forward(ctx, tape: list[Tensor], n_outputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.tape, ctx.n_kept = tape, len(tensors) - n_outputs
        ctx.save_for_backward(*tensors[n_outputs:])
        ctx.set_materialize_grads(False)
        tape.clear()
        return tuple(x.view_as(x) for x in tensors[:n_outputs])

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.tape[:] = ctx.saved_tensors  # the region comes next
        return None, None, *grads, *[None] * ctx.n_kept


@contextlib.contextmanager
def _at(region: Reuse) -> Iterator[None]:
    global _region
    before, _region = _region, region
    try:
        yield
    finally:
        _region = before


class _Again:
    """Around the second run of a region, and around every further one: a graph may be gone through twice."""

    def __init__(self, module: nn.Module, tape: list[Tensor]) -> None:
        self.module, self.region = module, Reuse(tape, recorded=True)

    def __enter__(self) -> None:
        self.blocks = contextlib.ExitStack()
        self.blocks.enter_context(_running_averages_kept(self.module))
        self.blocks.enter_context(_at(self.region))

    def __exit__(self, *error) -> None:
        self.blocks.close()


@contextlib.contextmanager
def _running_averages_kept(module: nn.Module) -> Iterator[None]:
    """Put back what batch norms have counted. The second pass may end before it has reached all of them."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var, norm.num_batches_tracked)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.data.copy_(value)  # autograd holds them too, and would take a change for one that matters
