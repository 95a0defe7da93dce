"""A step of Glow with its backward pass by hand: fewer passes over memory, less of it kept, networks made again."""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from flows.coupling import AdditiveCoupling
from flows.glow.conditioner import Folded
from flows.glow.kernels import images, pixels
from flows.transforms import many_at_once


def step(
    coupling: AdditiveCoupling,
    dtype: torch.dtype,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    folded: Folded,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """The coupling of W x + b, its network's products in `dtype`: x (B, C, H, W), weight (C, C), bias (C,).

    Returns y (B, C, H, W) and log_det (B,), what the coupling's gradients take beside y, the network's hidden layers.
    """
    net = coupling.conditioner
    kept, changed = images(F.linear(pixels(x), weight, bias), x).chunk(2, dim=1)
    weights, biases = net.weights(folded, dtype), net.biases(folded, dtype, x.shape[-2:])
    hidden = net.hidden(kept, weights, biases)
    changed, log_det, state = coupling.change(changed, net.last(hidden[1], weights, biases))
    return (torch.cat([kept, changed], dim=1), log_det), state, hidden


class GlowStep(Function):
    """`step` with its gradients: GlowStep.apply(coupling, dtype, recompute, x, weight, bias, *folded) -> y, log_det.

    Kept are x, y (the x of the next step), the scales, and the hidden layers unless `recompute`: those are made again
    from y then, by the same operations, without the last convolution. y must not be changed in place, weights get
    gradients also where they are frozen (autograd drops them), and the transforms of torch.func cannot take it apart.
    """

    @staticmethod
    def forward(ctx, coupling, dtype, recompute, x, weight, bias, *folded):
        (y, log_det), state, hidden = step(coupling, dtype, x, weight, bias, Folded(*folded))
        ctx.coupling, ctx.dtype, ctx.n_state = coupling, dtype, len(state)
        ctx.save_for_backward(x, weight, bias, *folded, y, *state, *(() if recompute else hidden))
        return y, log_det

    @staticmethod
    def backward(ctx, grad, grad_log_det):
        x, weight, bias, *rest = ctx.saved_tensors
        n = len(Folded._fields)
        folded, y, state, hidden = (
            Folded(*rest[:n]),
            rest[n],
            rest[n + 1 :][: ctx.n_state],
            rest[n + 1 + ctx.n_state :],
        )
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled() or many_at_once(grad, grad_log_det):
                return (
                    None,
                    None,
                    None,
                    *_differentiable(ctx, (x, weight, bias, *folded), (grad, grad_log_det)),
                )
            net, weights = (
                ctx.coupling.conditioner,
                ctx.coupling.conditioner.weights(folded, ctx.dtype),
            )
            (kept, changed), (grad_kept, grad_changed) = y.chunk(2, dim=1), grad.chunk(2, dim=1)
            if not hidden:  # recompute
                hidden = net.hidden(kept, weights, net.biases(folded, ctx.dtype, x.shape[-2:]))
            grad_changed, grad_h = ctx.coupling.gradients(
                grad_changed, grad_log_det, changed, *state
            )
            grad_net, grad_folded = net.gradients(grad_h, kept, hidden, weights, folded)
            grad = pixels(torch.cat([grad_kept + grad_net, grad_changed], dim=1))
            grad_x = images(grad @ weight, x) if ctx.needs_input_grad[3] else None
            return None, None, None, grad_x, grad.T @ pixels(x), grad.sum(0), *grad_folded


def _differentiable(
    ctx, inputs: tuple[Tensor | None, ...], grads: tuple[Tensor, Tensor]
) -> list[Tensor | None]:
    """The same gradients as autograd makes them."""
    again = torch.is_grad_enabled()  # these gradients will be differentiated
    if not again:
        inputs = [None if i is None else i.detach().requires_grad_(i.requires_grad) for i in inputs]
    x, weight, bias, *folded = inputs
    with torch.enable_grad():
        outputs, _, _ = step(ctx.coupling, ctx.dtype, x, weight, bias, Folded(*folded))
    pairs = [
        (output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad
    ]
    outputs, grads = zip(*pairs, strict=True)  # an additive coupling's log_det is a constant
    needed = [i for i, is_needed in enumerate(ctx.needs_input_grad[3:]) if is_needed]
    needed_gradients = torch.autograd.grad(
        outputs, [inputs[i] for i in needed], grads, create_graph=again
    )
    gradients = [None] * len(inputs)
    for i, gradient in zip(needed, needed_gradients, strict=True):
        gradients[i] = gradient
    return gradients
