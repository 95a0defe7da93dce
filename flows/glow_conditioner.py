"""The network in Glow's couplings, and its gradients by hand."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.caching import once
from flows.convolution import (
    add_relu,
    conv3x3,
    conv3x3_gradients,
    images,
    pixels,
    relu_gradient,
    scaled,
    scaled_gradients,
)
from flows.edge_convolution import EdgeConv2d, ZeroConv2d
from flows.normalization import ActNorm, scales_and_biases


class Folded(NamedTuple):
    """A `GlowConditioner`'s tensors: weights as they are learned, what their rows are scaled by, what is added after.

    edge: as of `EdgeConv2d.scaled_edges`.
    """

    weight_in: Tensor
    scale_in: Tensor
    bias_in: Tensor
    edge_in: Tensor | None
    weight_mid: Tensor
    scale_mid: Tensor
    bias_mid: Tensor
    weight_out: Tensor
    scale_out: Tensor
    bias_out: Tensor
    edge_out: Tensor | None


Three = tuple[Tensor, Tensor, Tensor]  # one a layer


class GlowConditioner(nn.Module):
    """3x3 -> actnorm -> ReLU -> 1x1 -> actnorm -> ReLU -> zero-initialised 3x3 (authors' code).

    The paper's text does not mention the actnorms inside. A public Glow without them, and without a warm-up, turns NaN
    (rosinality/glow-pytorch issue 25). They are folded into the convolutions before them.

    x: (B, C_in, H, W). edges: as in `EdgeConv2d`. Returns (B, C_out, H, W).
    """

    def __init__(
        self, in_channels: int, out_channels: int, hidden_channels: int, edges: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.conv_in = EdgeConv2d(in_channels, hidden_channels, edges)
        self.norm_in = ActNorm(hidden_channels)
        self.conv_mid = nn.Conv2d(hidden_channels, hidden_channels, 1, bias=False)
        nn.init.normal_(self.conv_mid.weight, std=0.05)
        self.norm_mid = ActNorm(hidden_channels)
        self.conv_out = ZeroConv2d(hidden_channels, out_channels, edges)

    def forward(self, x: Tensor) -> Tensor:
        dtype = dtype_of_products(x)
        weights, biases = once(self, f"layers in {dtype}", lambda: self._layers(dtype))
        return self.last(self.hidden(x, weights, biases)[1], weights, biases)

    def hidden(self, x: Tensor, weights: Three, biases: Three) -> tuple[Tensor, Tensor]:
        """What both ReLUs give, (B, hidden, H, W), in the dtype of the weights."""
        first = add_relu(conv3x3(x.to(weights[0].dtype), weights[0]), biases[0])
        return first, images(add_relu(F.linear(pixels(first), weights[1], biases[1])), first)

    def last(self, second: Tensor, weights: Three, biases: Three) -> Tensor:
        """The output, in the dtype of its bias, from the second hidden layer."""
        return conv3x3(second, weights[2]).to(biases[2].dtype) + biases[2]

    @staticmethod
    def fold(nets: list["GlowConditioner"]) -> list[Folded]:
        """The tensors of n networks of one shape, with their actnorms folded into the convolutions before them.

        At once: n times a few small operations are a twentieth of the time of a step at K=8, H=128.
        """
        convs_in, convs_out = [net.conv_in for net in nets], [net.conv_out for net in nets]
        norms_in, norms_mid = [net.norm_in for net in nets], [net.norm_mid for net in nets]
        scale_in, bias_in = scales_and_biases([norm.log_scale for norm in norms_in], [norm.bias for norm in norms_in])
        scale_mid, bias_mid = scales_and_biases(
            [norm.log_scale for norm in norms_mid], [norm.bias for norm in norms_mid]
        )
        scale_out, bias_out = scales_and_biases(
            [conv.log_scale for conv in convs_out], [conv.shift for conv in convs_out]
        )
        columns = Folded(
            [conv.weight for conv in convs_in],
            scale_in.unbind(),
            bias_in.unbind(),
            EdgeConv2d.scaled_edges(convs_in, scale_in),
            [net.conv_mid.weight for net in nets],
            scale_mid.unbind(),
            bias_mid.unbind(),
            [conv.weight for conv in convs_out],
            scale_out.unbind(),
            bias_out.unbind(),
            EdgeConv2d.scaled_edges(convs_out, scale_out),
        )
        return [Folded(*row) for row in zip(*columns, strict=True)]

    @staticmethod
    def weights(folded: Folded, dtype: torch.dtype) -> Three:
        """(hidden, C_in, 3, 3), (hidden, hidden), (C_out, hidden, 3, 3)."""
        return (
            scaled(folded.weight_in, folded.scale_in, dtype),
            scaled(folded.weight_mid.flatten(1), folded.scale_mid, dtype),
            scaled(folded.weight_out, folded.scale_out, dtype),
        )

    def biases(self, folded: Folded, dtype: torch.dtype) -> Three:
        """(hidden, H, W) or without edges (hidden, 1, 1), (hidden,), and as the first with C_out: never in half."""
        return (
            self.conv_in.added(folded.bias_in, folded.edge_in).to(dtype),
            folded.bias_mid.to(dtype),
            self.conv_out.added(folded.bias_out, folded.edge_out),
        )

    def _layers(self, dtype: torch.dtype) -> tuple[Three, Three]:
        (folded,), device = self.fold([self]), self.conv_mid.weight.device.type
        with torch.autocast(device, enabled=False):
            return self.weights(folded, dtype), self.biases(folded, dtype)

    def gradients(
        self, grad: Tensor, x: Tensor, hidden: tuple[Tensor, Tensor], weights: Three, folded: Folded
    ) -> tuple[Tensor, Folded]:
        """Those of x and of all in `folded`, from that of the output: the chain rule, from the last layer on."""
        (first, second), dtype = hidden, folded.bias_mid.dtype
        bias_out, edge_out = self.conv_out.added_gradients(grad, dtype)
        grad, weight_out = conv3x3_gradients(grad.to(second.dtype), second, weights[2])
        grad = pixels(relu_gradient(grad, second))
        bias_mid, weight_mid = grad.sum(0, dtype=dtype), grad.T @ pixels(first)
        grad = relu_gradient(images(grad @ weights[1], first), first)
        bias_in, edge_in = self.conv_in.added_gradients(grad, dtype)
        grad, weight_in = conv3x3_gradients(grad, x.to(first.dtype), weights[0])
        weight_mid = weight_mid.view_as(folded.weight_mid)
        return grad, Folded(
            *scaled_gradients(weight_in, folded.weight_in, folded.scale_in),
            bias_in,
            edge_in,
            *scaled_gradients(weight_mid, folded.weight_mid, folded.scale_mid),
            bias_mid,
            *scaled_gradients(weight_out, folded.weight_out, folded.scale_out),
            bias_out,
            edge_out,
        )

    def initialize(self, x: Tensor) -> None:
        """Set both actnorms from what comes to them; here they are not folded."""
        h = self.norm_in.initialize(self.conv_in(x)).relu()
        self.norm_mid.initialize(self.conv_mid(h))


def dtype_of_products(x: Tensor) -> torch.dtype:
    """That of autocast where it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
