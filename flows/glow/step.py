"""A step of Glow with a hand-written backward pass, which is faster and keeps less memory."""

from collections.abc import Sequence
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from flows.base import Flow
from flows.by_hand import gradients_by_autograd, need_autograd
from flows.coupling import AdditiveCoupling, SigmoidCoupling
from flows.glow.conditioner import Folded, GlowConditioner
from flows.glow.kernels import images, pixels, size_of


def network(coupling: AdditiveCoupling) -> GlowConditioner:
    """The network of a coupling for which `has_gradients_by_hand` is true."""
    return cast(GlowConditioner, coupling.conditioner)


def has_gradients_by_hand(coupling: Flow) -> bool:
    """Whether `GlowStep` can compute the coupling and its gradients.

    The types have to match exactly, since a subclass may compute something else. The network must
    take no context.
    """
    if type(coupling) not in (AdditiveCoupling, SigmoidCoupling):
        return False
    net = cast(AdditiveCoupling, coupling).conditioner
    return type(net) is GlowConditioner and not net.context_channels


def step(
    coupling: AdditiveCoupling,
    dtype: torch.dtype,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    folded: Folded,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """Apply the coupling to W x + b, with matrix products of its network in `dtype`.

    x: (B, C, H, W). weight: W, (C, C). bias: b, (C,). folded: the tensors of the network.

    Returns y, (B, C, H, W), with the coupling's log_det, (B,); the tensors that the coupling's
    `gradients` needs in addition to y; the outputs of the network's two ReLUs.
    """
    net = network(coupling)
    kept, changed = images(F.linear(pixels(x), weight, bias), x).chunk(2, dim=1)
    weights = net.weights(folded, dtype)
    biases = net.biases(folded, dtype, size_of(x))
    hidden = net.hidden(kept, weights, biases)
    changed, log_det, state = coupling.change(changed, net.last(hidden[1], weights, biases))
    return (torch.cat([kept, changed], dim=1), log_det), state, hidden


class StepContext(Protocol):
    """The `ctx` that torch passes to a `Function`, with the attributes that `GlowStep` sets."""

    coupling: AdditiveCoupling
    dtype: torch.dtype
    n_state: int
    needs_input_grad: Sequence[bool]
    saved_tensors: Sequence[Tensor]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for the backward pass."""


class GlowStep(Function):
    """`step` as an autograd function: GlowStep.apply(...) returns y and log_det.

    The arguments are coupling, dtype, recompute, x, weight, bias, *folded. The backward pass keeps
    x, y (which is the x of the next step), the scales of the coupling and, unless `recompute`, the
    hidden layers of the network. With `recompute` it computes the hidden layers again from y, by
    the same operations, without the last convolution.

    y must not be changed in place. Gradients of frozen weights are computed too; autograd drops
    them. The transforms of torch.func cannot differentiate it, so `Steps` does not use it there.
    """

    @staticmethod
    def forward(
        ctx: StepContext,
        coupling: AdditiveCoupling,
        dtype: torch.dtype,
        recompute: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        *folded: Tensor,
    ) -> tuple[Tensor, Tensor]:
        (y, log_det), state, hidden = step(coupling, dtype, x, weight, bias, Folded(*folded))
        ctx.coupling = coupling
        ctx.dtype = dtype
        ctx.n_state = len(state)
        if recompute:
            ctx.save_for_backward(x, weight, bias, *folded, y, *state)
        else:
            ctx.save_for_backward(x, weight, bias, *folded, y, *state, *hidden)
        return y, log_det

    @staticmethod
    def backward(ctx: StepContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *others = ctx.saved_tensors
        n = len(Folded._fields)
        folded = Folded(*others[:n])
        with torch.autocast(x.device.type, enabled=False):
            if need_autograd(grads):
                inputs = (x, weight, bias, *folded)
                by_autograd = gradients_by_autograd(
                    partial(_outputs, ctx), inputs, ctx.needs_input_grad[3:], grads
                )
                return None, None, None, *by_autograd
            y, *others = others[n:]
            state = others[: ctx.n_state]
            hidden = others[ctx.n_state :]
            grad, grad_folded = _coupling_gradients(ctx, grads, y, folded, state, hidden)
            grad_x = None
            if ctx.needs_input_grad[3]:
                grad_x = images(grad @ weight, x)
            return None, None, None, grad_x, grad.T @ pixels(x), grad.sum(0), *grad_folded


def _outputs(
    ctx: StepContext, x: Tensor, weight: Tensor, bias: Tensor, *folded: Tensor
) -> tuple[Tensor, Tensor]:
    """The outputs of `step`."""
    outputs, _, _ = step(ctx.coupling, ctx.dtype, x, weight, bias, Folded(*folded))
    return outputs


def _coupling_gradients(
    ctx: StepContext,
    grads: Sequence[Tensor],
    y: Tensor,
    folded: Folded,
    state: Sequence[Tensor],
    hidden: Sequence[Tensor],
) -> tuple[Tensor, Folded]:
    """The gradients of the coupling's input, (B H W, C), and of every tensor in `folded`.

    grads: the gradients of y and log_det. hidden: the outputs of the network's two ReLUs; if it is
    empty, they are computed again.
    """
    grad, grad_log_det = grads
    net = network(ctx.coupling)
    weights = net.weights(folded, ctx.dtype)
    kept, changed = y.chunk(2, dim=1)
    grad_kept, grad_changed = grad.chunk(2, dim=1)
    if hidden:
        first, second = hidden
    else:
        biases = net.biases(folded, ctx.dtype, size_of(y))
        first, second = net.hidden(kept, weights, biases)
    grad_changed, grad_h = ctx.coupling.gradients(grad_changed, grad_log_det, changed, *state)
    grad_net, _, grad_folded = net.gradients(grad_h, kept, (first, second), weights, folded)
    return pixels(torch.cat([grad_kept + grad_net, grad_changed], dim=1)), grad_folded
