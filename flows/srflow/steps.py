"""The conditional steps in a level of SRFlow, with a hand-written backward pass.

By itself, autograd would keep the inputs of every network for the backward pass, with a copy of the
context's many channels in each. Here only the hidden layers of the networks are kept.
"""

from collections.abc import Sequence
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from flows.base import Compose, Flow
from flows.by_hand import gradients_by_autograd, need_autograd
from flows.caching import once
from flows.coupling import AdditiveCoupling, AffineInjector, SigmoidCoupling
from flows.glow.conditioner import Folded, GlowConditioner, dtype_of_products
from flows.glow.kernels import images, pixels, size_of
from flows.glow.step import network
from flows.glow.steps import Steps

N_FOLDED = len(Folded._fields)


class ConditionalSteps(Steps):
    """K steps, each an actnorm, a permutation, and couplings whose networks take the context.

    The map is that of `Steps`. The third flow of a step is a coupling, or a `Compose` of couplings
    and injectors. If all of them are a `SigmoidCoupling` or an `AffineInjector` with a
    `GlowConditioner` that takes a context, the backward pass is written by hand
    (`ConditionalStep`); otherwise autograd computes it.

    If the attribute `recompute` is true, a step keeps only its input for the backward pass.

    >>> from flows.linear import InvertibleConv1x1LU
    >>> from flows.normalization import ActNorm
    >>> network = GlowConditioner(2, 4, hidden_channels=8, edges=False, context_channels=3)
    >>> steps = ConditionalSteps([(ActNorm(4), InvertibleConv1x1LU(4), SigmoidCoupling(network))])
    >>> y, log_det = steps(torch.rand(2, 4, 6, 6), torch.rand(2, 3, 6, 6))
    >>> y.shape, log_det.shape
    (torch.Size([2, 4, 6, 6]), torch.Size([2]))
    """

    def has_gradients_by_hand(self, coupling: Flow) -> bool:
        return all(map(_is_known, parts(coupling)))

    def _forward_by_hand(
        self,
        x: Tensor,
        total: Tensor,
        maps: list[tuple[Tensor, Tensor]],
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = dtype_of_products(x)
        couplings = [parts(coupling) for coupling in self._couplings()]
        networks = once(self, "networks", lambda: _folded(couplings))
        with torch.autocast(x.device.type, enabled=False):
            for layers, (weight, bias), folded in zip(couplings, maps, networks, strict=True):
                x, log_det = ConditionalStep.apply(
                    layers, dtype, self.recompute, x, weight, bias, context, *folded
                )
                total = total + log_det
        return x, total


def parts(coupling: Flow) -> list[AdditiveCoupling]:
    """The couplings and injectors that the third flow of a step consists of."""
    layers = list(coupling.layers) if type(coupling) is Compose else [coupling]
    return cast(list[AdditiveCoupling], layers)


def _is_known(layer: Flow) -> bool:
    """Whether `ConditionalStep` can compute a coupling or injector and its gradients.

    The types have to match exactly, since a subclass may compute something else.
    """
    if type(layer) not in (SigmoidCoupling, AffineInjector):
        return False
    net = cast(AdditiveCoupling, layer).conditioner
    return type(net) is GlowConditioner and net.context_channels > 0


def _folded(couplings: Sequence[Sequence[AdditiveCoupling]]) -> list[list[Tensor | None]]:
    """For each step the tensors of its networks (`Folded`), one network after the other."""
    positions = zip(*couplings, strict=True)
    columns = [GlowConditioner.fold(list(map(network, layers))) for layers in positions]
    return [[tensor for folded in row for tensor in folded] for row in zip(*columns, strict=True)]


# For each layer of a step: its output, what its `gradients` needs in addition, and the outputs of
# the two ReLUs of its network.
State = tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, Tensor]]


def step(
    layers: Sequence[AdditiveCoupling],
    dtype: torch.dtype,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    context: Tensor,
    *folded: Tensor,
) -> tuple[tuple[Tensor, Tensor], list[State]]:
    """Apply the layers to W x + b, with matrix products of their networks in `dtype`.

    x: (B, C, H, W). weight: W, (C, C). bias: b, (C,). context: (B, F, H, W). folded: the tensors of
    the networks, one network after the other.

    Returns y, (B, C, H, W), with the log_det of the layers, (B,); the state of each layer.
    """
    y = images(F.linear(pixels(x), weight, bias), x)
    narrow = context.to(dtype)
    total = None
    states = []
    for layer, own in zip(layers, _by_layer(folded), strict=True):
        net = network(layer)
        weights = net.weights(own, dtype)
        biases = net.biases(own, dtype, size_of(x))
        kept, changed = layer.split(y)
        first, second = net.hidden(kept, weights, biases, narrow)
        changed, log_det, state = layer.change(changed, net.last(second, weights, biases))
        y = layer.joined(kept, changed)
        total = log_det if total is None else total + log_det
        states.append((y, state, (first, second)))
    return (y, cast(Tensor, total)), states


def _by_layer(folded: Sequence[Tensor]) -> list[Folded]:
    """The tensors of each network."""
    starts = range(0, len(folded), N_FOLDED)
    return [Folded(*folded[start : start + N_FOLDED]) for start in starts]


class StepContext(Protocol):
    """The `ctx` that torch passes to a `Function`, with the attributes of `ConditionalStep`."""

    layers: Sequence[AdditiveCoupling]
    dtype: torch.dtype
    needs_input_grad: Sequence[bool]
    saved_tensors: Sequence[Tensor]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for the backward pass."""


class ConditionalStep(Function):
    """`step` as an autograd function: ConditionalStep.apply(...) returns y and log_det.

    The arguments are layers, dtype, recompute, x, weight, bias, context, *folded. The backward pass
    keeps x, the context (which all steps of a level share) and the states of the layers; the last
    of these has y, which is the x of the next step. With `recompute` it computes the states again.

    The gradient of the context, a third of the work, is computed only if it is needed.

    y must not be changed in place. The transforms of torch.func cannot differentiate it, so
    `ConditionalSteps` does not use it there.
    """

    @staticmethod
    def forward(
        ctx: StepContext,
        layers: Sequence[AdditiveCoupling],
        dtype: torch.dtype,
        recompute: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        context: Tensor,
        *folded: Tensor,
    ) -> tuple[Tensor, Tensor]:
        (y, log_det), states = step(layers, dtype, x, weight, bias, context, *folded)
        ctx.layers = layers
        ctx.dtype = dtype
        kept = [] if recompute else [tensor for state in states for tensor in _flat(state)]
        ctx.save_for_backward(x, weight, bias, context, *folded, *kept)
        return y, log_det

    @staticmethod
    def backward(ctx: StepContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        n = 4 + N_FOLDED * len(ctx.layers)
        inputs = ctx.saved_tensors[:n]
        kept = ctx.saved_tensors[n:]
        x, weight, _, context, *folded = inputs
        with torch.autocast(x.device.type, enabled=False):
            if need_autograd(grads):
                by_autograd = gradients_by_autograd(
                    partial(_outputs, ctx), inputs, ctx.needs_input_grad[3:], grads
                )
                return None, None, None, *by_autograd
            if kept:
                states = _states(ctx.layers, kept)
            else:
                _, states = step(ctx.layers, ctx.dtype, *inputs)
            grad, grad_context, grad_folded = _layer_gradients(ctx, grads, context, folded, states)
            rows = pixels(grad)
            grad_x = None
            if ctx.needs_input_grad[3]:
                grad_x = images(rows @ weight, x)
            return (
                None,
                None,
                None,
                grad_x,
                rows.T @ pixels(x),
                rows.sum(0),
                grad_context,
                *grad_folded,
            )


def _outputs(ctx: StepContext, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of `step`."""
    outputs, _ = step(ctx.layers, ctx.dtype, *inputs)
    return outputs


def _flat(state: State) -> tuple[Tensor, ...]:
    y, others, hidden = state
    return (y, *others, *hidden)


def _states(layers: Sequence[AdditiveCoupling], kept: Sequence[Tensor]) -> list[State]:
    """The states of all layers, from their tensors one after the other."""
    n = len(kept) // len(layers)
    states: list[State] = []
    for i in range(len(layers)):
        y, *others, first, second = kept[i * n : (i + 1) * n]
        states.append((y, tuple(others), (first, second)))
    return states


def _layer_gradients(
    ctx: StepContext,
    grads: Sequence[Tensor],
    context: Tensor,
    folded: Sequence[Tensor],
    states: Sequence[State],
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """The gradients of the first layer's input, of the context, and of every tensor in `folded`.

    They follow by the chain rule from the last layer to the first.

    grads: the gradients of y and log_det.
    """
    grad, grad_log_det = grads
    grad_context = None
    grad_folded: list[Tensor | None] = []
    networks = _by_layer(folded)
    narrow = context.to(ctx.dtype)
    for layer, own, (y, state, hidden) in reversed(
        list(zip(ctx.layers, networks, states, strict=True))
    ):
        net = network(layer)
        kept, changed = layer.split(y)
        grad_kept, grad_changed = layer.split(grad)
        grad_changed, grad_h = layer.gradients(grad_changed, grad_log_det, changed, *state)
        grad_net, grad_own, grad_of_folded = net.gradients(
            grad_h,
            kept,
            hidden,
            net.weights(own, ctx.dtype),
            own,
            narrow,
            needs_context=ctx.needs_input_grad[6],
        )
        grad = layer.joined(grad_kept + grad_net, grad_changed)
        if grad_own is not None:
            grad_own = grad_own.to(context.dtype)
            grad_context = grad_own if grad_context is None else grad_context + grad_own
        grad_folded = [*grad_of_folded, *grad_folded]
    return grad, grad_context, grad_folded
