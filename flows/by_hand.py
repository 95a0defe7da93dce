"""What functions with a hand-written backward pass share (`GlowStep`, `ConditionalStep`, ...)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flows.transforms import are_batched


def need_autograd(grads: Sequence[Tensor]) -> bool:
    """Whether the gradients will be differentiated again, or are a batch of gradients.

    A hand-written backward pass supports neither, and calls `gradients_by_autograd` instead.
    """
    return torch.is_grad_enabled() or are_batched(*grads)


def gradients_by_autograd(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients of the inputs of function(*inputs), computed by autograd.

    needed: for which inputs; the others get None. grads: the gradients of the function's outputs.
    """
    differentiable = torch.is_grad_enabled()
    inputs = [_apart(tensor, differentiable) for tensor in inputs]
    with torch.enable_grad():
        outputs = function(*inputs)
    # An output may be a constant, as the log_det of an additive coupling: it needs no gradient.
    pairs = [pair for pair in zip(outputs, grads, strict=True) if pair[0].requires_grad]
    wanted = [(i, tensor) for i, tensor in enumerate(inputs) if tensor is not None and needed[i]]
    computed = torch.autograd.grad(
        [output for output, _ in pairs],
        [tensor for _, tensor in wanted],
        [grad for _, grad in pairs],
        create_graph=differentiable,
    )
    gradients: list[Tensor | None] = [None] * len(inputs)
    for (i, _), gradient in zip(wanted, computed, strict=True):
        gradients[i] = gradient
    return gradients


def _apart(tensor: Tensor | None, differentiable: bool) -> Tensor | None:
    """The tensor as an input of its own: without its history or, if `differentiable`, as a view.

    Of a view, because one input may have been computed from another one, as the x of a step from
    the context of all steps. The gradient would then reach the other one twice.
    """
    if tensor is None:
        return None
    if differentiable:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_(tensor.requires_grad)
