"""The network in Glow's couplings, and its gradients by hand."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.caching import once
from flows.glow.edges import EdgeConv2d, ZeroConv2d, added
from flows.glow.kernels import (
    add_relu,
    conv3x3,
    conv3x3_gradients,
    images,
    pixels,
    relu_gradient,
    scaled,
    scaled_gradients,
)
from flows.normalization import ActNorm, scales_and_biases


class Folded(NamedTuple):
    """A `GlowConditioner`'s tensors with actnorms and factors folded in, or the gradients of these tensors.

    Of each layer the weight as it is learned, what its rows are scaled by, (C_out,), and a bias that is added after
    that, (C_out,); of the 3x3 ones the border's weight as it is learned, (C_out, 1, 3, 3), or None without edges.
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


PerLayer = tuple[Tensor, Tensor, Tensor]


class GlowConditioner(nn.Module):
    """3x3 -> actnorm -> ReLU -> 1x1 -> actnorm -> ReLU -> zero-initialised 3x3 (authors' code).

    The paper's text does not mention the actnorms inside. A public Glow without them, and without a warm-up, turns NaN
    (rosinality/glow-pytorch issue 25). They are folded into the convolutions before them.

    x: (B, C_in, H, W). edges: as in `EdgeConv2d`. Returns (B, C_out, H, W). Has no use for a context.
    """

    def __init__(
        self, in_channels: int, out_channels: int, hidden_channels: int, edges: bool
    ) -> None:
        super().__init__()
        self.conv_in = EdgeConv2d(in_channels, hidden_channels, edges)
        self.norm_in = ActNorm(hidden_channels)
        self.conv_mid = nn.Conv2d(hidden_channels, hidden_channels, 1, bias=False)
        nn.init.normal_(self.conv_mid.weight, std=0.05)
        self.norm_mid = ActNorm(hidden_channels)
        self.conv_out = ZeroConv2d(hidden_channels, out_channels, edges)

    def forward(self, x: Tensor, context=None) -> Tensor:
        dtype = dtype_of_products(x)
        size = tuple(x.shape[-2:])
        weights, biases = once(self, f"layers in {dtype}", lambda: self._layers(dtype, size), size)
        return self.last(self.hidden(x, weights, biases)[1], weights, biases)

    def hidden(self, x: Tensor, weights: PerLayer, biases: PerLayer) -> tuple[Tensor, Tensor]:
        """What both ReLUs give, (B, hidden, H, W), in the dtype of the weights."""
        first = add_relu(conv3x3(x.to(weights[0].dtype), weights[0]), biases[0])
        return first, images(add_relu(F.linear(pixels(first), weights[1], biases[1])), first)

    def last(self, second: Tensor, weights: PerLayer, biases: PerLayer) -> Tensor:
        """The output, in the dtype of its bias, from the second hidden layer."""
        return conv3x3(second, weights[2]).to(biases[2].dtype) + biases[2]

    @staticmethod
    def fold(nets: list["GlowConditioner"]) -> list[Folded]:
        """The tensors of n networks of one shape, with their actnorms folded into the convolutions before them.

        At once: n times a few small operations are a twentieth of the time of a step at K=8, H=128.
        """
        norms_in, norms_mid = [net.norm_in for net in nets], [net.norm_mid for net in nets]
        convs_out = [net.conv_out for net in nets]
        scale_in, bias_in = scales_and_biases(
            [norm.log_scale for norm in norms_in], [norm.bias for norm in norms_in]
        )
        scale_mid, bias_mid = scales_and_biases(
            [norm.log_scale for norm in norms_mid], [norm.bias for norm in norms_mid]
        )
        scale_out, bias_out = scales_and_biases(
            [conv.log_scale for conv in convs_out], [conv.shift for conv in convs_out]
        )
        rows = zip(
            nets,
            *(x.unbind() for x in (scale_in, bias_in, scale_mid, bias_mid, scale_out, bias_out)),
            strict=True,
        )
        return [
            Folded(
                *(net.conv_in.weight, s_in, b_in, net.conv_in.edge_weight),
                *(net.conv_mid.weight, s_mid, b_mid),
                *(net.conv_out.weight, s_out, b_out, net.conv_out.edge_weight),
            )
            for net, s_in, b_in, s_mid, b_mid, s_out, b_out in rows
        ]

    @staticmethod
    def weights(folded: Folded, dtype: torch.dtype) -> PerLayer:
        """(hidden, C_in, 3, 3), (hidden, hidden), (C_out, hidden, 3, 3)."""
        return (
            scaled(folded.weight_in, folded.scale_in, dtype),
            scaled(folded.weight_mid.flatten(1), folded.scale_mid, dtype),
            scaled(folded.weight_out, folded.scale_out, dtype),
        )

    @staticmethod
    def biases(folded: Folded, dtype: torch.dtype, size: tuple[int, int]) -> PerLayer:
        """(hidden, H, W) or without edges (hidden, 1, 1), (hidden,), and as the first with C_out: never in half.

        size: (H, W) of the images.
        """
        return (
            added(folded.bias_in, folded.edge_in, folded.scale_in, size).to(dtype),
            folded.bias_mid.to(dtype),
            added(folded.bias_out, folded.edge_out, folded.scale_out, size),
        )

    def _layers(self, dtype: torch.dtype, size: tuple[int, int]) -> tuple[PerLayer, PerLayer]:
        (folded,), device = self.fold([self]), self.conv_mid.weight.device.type
        with torch.autocast(device, enabled=False):
            return self.weights(folded, dtype), self.biases(folded, dtype, size)

    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        hidden: tuple[Tensor, Tensor],
        weights: PerLayer,
        folded: Folded,
    ) -> tuple[Tensor, Folded]:
        """Those of x and of all in `folded`, from that of the output: the chain rule, from the last layer on."""
        first, second = hidden
        bias_out, edge_out, edge_scale_out = self.conv_out.added_gradients(
            grad, folded.edge_out, folded.scale_out
        )
        grad, weight_out = conv3x3_gradients(grad.to(second.dtype), second, weights[2])
        grad = pixels(relu_gradient(grad, second))
        bias_mid, weight_mid = grad.sum(0, dtype=folded.bias_mid.dtype), grad.T @ pixels(first)
        grad = relu_gradient(images(grad @ weights[1], first), first)
        bias_in, edge_in, edge_scale_in = self.conv_in.added_gradients(
            grad, folded.edge_in, folded.scale_in
        )
        grad, weight_in = conv3x3_gradients(grad, x.to(first.dtype), weights[0])
        weight_in, scale_in = scaled_gradients(weight_in, folded.weight_in, folded.scale_in)
        weight_mid, scale_mid = scaled_gradients(
            weight_mid.view_as(folded.weight_mid), folded.weight_mid, folded.scale_mid
        )
        weight_out, scale_out = scaled_gradients(weight_out, folded.weight_out, folded.scale_out)
        if edge_scale_in is not None:
            scale_in, scale_out = scale_in + edge_scale_in, scale_out + edge_scale_out
        return grad, Folded(
            *(weight_in, scale_in, bias_in, edge_in),
            *(weight_mid, scale_mid, bias_mid),
            *(weight_out, scale_out, bias_out, edge_out),
        )

    def initialize(self, x: Tensor, context=None) -> None:
        """Set both actnorms from what comes to them; here they are not folded."""
        h = self.norm_in.initialize(self.conv_in(x)).relu()
        self.norm_mid.initialize(self.conv_mid(h))


def dtype_of_products(x: Tensor) -> torch.dtype:
    """That of autocast where it is on, else that of x; float64 stays, as under autocast itself."""
    device = x.device.type
    mixed = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if mixed else x.dtype
