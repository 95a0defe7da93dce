"""The dense block of RRDB, with a hand-written backward pass that keeps little memory."""

from collections.abc import Sequence
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from flows.base import module_list
from flows.by_hand import gradients_by_autograd, need_autograd
from flows.glow.conditioner import dtype_of_products
from flows.glow.kernels import convolution_gradients
from flows.transforms import in_trace, in_transform

SLOPE = 0.2  # of LeakyReLU where its input is negative
RESIDUAL = 0.2  # the factor of what a block adds to its input
N_LAYERS = 10  # the weights and biases of five convolutions
ALL = (True, True, True)  # the gradients of a convolution's input, weight and bias


class DenseBlock(nn.Module):
    """x + .2 conv_5([x, x_1 .. x_4]), where x_k = LeakyReLU(conv_k([x, x_1 .. x_(k-1)])).

    Five 3x3 convolutions, of which each takes the outputs of all earlier ones (Wang et al. 2018,
    figure 4). Their initial weights are those of He et al. 2015 times .1, and their biases 0.

    x: (B, channels, h, w). growth: the channels of x_1 .. x_4.
    """

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        outputs = [growth] * 4 + [channels]
        self.convs = module_list(
            nn.Conv2d(channels + i * growth, c_out, 3, padding=1) for i, c_out in enumerate(outputs)
        )
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight)
            with torch.no_grad():
                conv.weight.mul_(0.1)
            nn.init.zeros_(cast(Tensor, conv.bias))

    def forward(self, x: Tensor) -> Tensor:
        dtype = dtype_of_products(x)
        layers = [
            tensor for conv in self.convs for tensor in (conv.weight, cast(Tensor, conv.bias))
        ]
        with torch.autocast(x.device.type, enabled=False):
            if in_trace() or in_transform():
                y, _ = dense(dtype, x, *layers)
                return y
            return DenseFunction.apply(dtype, x, *layers)


def dense(dtype: torch.dtype, x: Tensor, *layers: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output of a `DenseBlock`, and x and x_1 .. x_4 in `dtype`, that of the convolutions.

    layers: weight and bias of each convolution. The sum with x has the dtype of x.
    """
    parts = [x.to(dtype)]
    *inner, (weight, bias) = zip(layers[::2], layers[1::2], strict=True)
    for own_weight, own_bias in inner:
        h = F.conv2d(torch.cat(parts, dim=1), own_weight.to(dtype), own_bias.to(dtype), padding=1)
        parts.append(F.leaky_relu(h, SLOPE))
    h = F.conv2d(torch.cat(parts, dim=1), weight.to(dtype), bias.to(dtype), padding=1)
    return x + RESIDUAL * h, parts


class DenseContext(Protocol):
    """The `ctx` that torch passes to a `Function`, with the attribute of `DenseFunction`."""

    dtype: torch.dtype
    needs_input_grad: Sequence[bool]
    saved_tensors: Sequence[Tensor]

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep tensors for the backward pass."""


class DenseFunction(Function):
    """`dense` as an autograd function, which returns the output alone.

    The backward pass keeps x and x_1 .. x_4. By itself, autograd would keep the inputs of all five
    convolutions, which are these tensors joined in five ways.
    """

    @staticmethod
    def forward(ctx: DenseContext, dtype: torch.dtype, x: Tensor, *layers: Tensor) -> Tensor:
        y, parts = dense(dtype, x, *layers)
        ctx.dtype = dtype
        ctx.save_for_backward(x, *layers, *parts)
        return y

    @staticmethod
    def backward(ctx: DenseContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        layers = others[:N_LAYERS]
        parts = others[N_LAYERS:]
        (grad,) = grads
        with torch.autocast(x.device.type, enabled=False):
            if need_autograd(grads):
                by_autograd = gradients_by_autograd(
                    partial(_outputs, ctx.dtype), (x, *layers), ctx.needs_input_grad[1:], grads
                )
                return None, *by_autograd
            grad_x, grad_layers = _dense_gradients(grad, layers, parts)
            return None, grad_x, *grad_layers


def _outputs(dtype: torch.dtype, *inputs: Tensor) -> tuple[Tensor]:
    """The output of `dense`, as a tuple."""
    y, _ = dense(dtype, *inputs)
    return (y,)


def _dense_gradients(
    grad: Tensor, layers: Sequence[Tensor], parts: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of x and of `layers`, from that of the output, from the last convolution back.

    layers, parts: as in `dense`.
    """
    sizes = [part.shape[1] for part in parts]
    dtype = parts[0].dtype
    grad_h = (RESIDUAL * grad).to(dtype)
    totals: dict[int, Tensor] = {}  # the sum of the gradients of each part so far
    gradients: list[Tensor] = []
    for i in reversed(range(len(parts))):
        grad_inputs, grad_weight, grad_bias = convolution_gradients(
            grad_h, torch.cat(list(parts[: i + 1]), dim=1), layers[2 * i].to(dtype), ALL
        )
        gradients = [grad_weight, grad_bias, *gradients]
        for k, share in enumerate(grad_inputs.split(sizes[: i + 1], dim=1)):
            totals[k] = totals[k] + share if k in totals else share
        if i:
            grad_h = torch.ops.aten.leaky_relu_backward(totals[i], parts[i], SLOPE, True)
    return grad + totals[0], gradients
