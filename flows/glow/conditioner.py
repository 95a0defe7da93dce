"""The network in Glow's couplings, with hand-written gradients."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.caching import once
from flows.glow.edges import EdgeConv2d, ZeroConv2d, scaled_bias
from flows.glow.kernels import (
    add_relu,
    conv3x3,
    conv3x3_gradients,
    convolution_gradients,
    images,
    pixels,
    relu_gradient,
    scaled,
    scaled_gradients,
    size_of,
)
from flows.normalization import ActNorm, scales_and_biases


class Folded(NamedTuple):
    """The tensors of a `GlowConditioner` with its actnorms and factors folded into convolutions.

    For each of the three layers (in, mid, out): the weight, as it is learned; the scale that
    multiplies its rows, (C_out,); the bias that is added after the scaling, (C_out,). For the two
    3x3 layers also the border's weight (`EdgeConv2d`), as it is learned, (C_out, 1, 3, 3), or None
    without edges. The gradients of these tensors are a `Folded` too.
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


# One tensor for each of the three layers.
PerLayer = tuple[Tensor, Tensor, Tensor]


class GlowConditioner(nn.Module):
    """3x3 -> actnorm -> ReLU -> 1x1 -> actnorm -> ReLU -> zero-initialised 3x3 (authors' code).

    The paper does not mention the actnorms. A public Glow that lacks them and a warm-up diverges to
    NaN (rosinality/glow-pytorch issue 25). Each actnorm is folded into the convolution before it.

    x: (B, C_in, H, W). edges: as in `EdgeConv2d`. Returns (B, C_out, H, W).
    context_channels: the channels of the context, (B, context_channels, H, W), which the first
        convolution takes after those of x; 0: a context is ignored. in_channels may then be 0.
    log_scale_factor: that of both actnorms.

    >>> net = GlowConditioner(2, 6, hidden_channels=8, edges=True)
    >>> net(torch.rand(5, 2, 4, 4)).shape
    torch.Size([5, 6, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        edges: bool,
        context_channels: int = 0,
        log_scale_factor: float = 3.0,
    ) -> None:
        super().__init__()
        self.context_channels = context_channels
        self.log_scale_factor = log_scale_factor
        self.conv_in = EdgeConv2d(in_channels + context_channels, hidden_channels, edges)
        self.norm_in = ActNorm(hidden_channels, log_scale_factor)
        self.conv_mid = nn.Conv2d(hidden_channels, hidden_channels, 1, bias=False)
        nn.init.normal_(self.conv_mid.weight, std=0.05)
        self.norm_mid = ActNorm(hidden_channels, log_scale_factor)
        self.conv_out = ZeroConv2d(hidden_channels, out_channels, edges)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        dtype = dtype_of_products(x)
        size = size_of(x)
        weights, biases = once(self, f"layers in {dtype}", lambda: self._layers(dtype, size), size)
        _, second = self.hidden(x, weights, biases, context)
        return self.last(second, weights, biases)

    def hidden(
        self, x: Tensor, weights: PerLayer, biases: PerLayer, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The outputs of both ReLUs, (B, hidden, H, W), in the dtype of the weights."""
        first = add_relu(self._first(x, context, weights[0]), biases[0])
        second = add_relu(F.linear(pixels(first), weights[1], biases[1]))
        return first, images(second, first)

    def _first(self, x: Tensor, context: Tensor | None, weight: Tensor) -> Tensor:
        """The first convolution, which is one of x plus one of the context.

        Joining x and the context would copy the many channels of the context in every network.
        """
        n = x.shape[1]
        if not self.context_channels:
            return conv3x3(x.to(weight.dtype), weight)
        if context is None:
            raise ValueError("the network of this coupling takes a context: give one")
        of_context = conv3x3(context.to(weight.dtype), weight[:, n:])
        if not n:
            return of_context
        return of_context + conv3x3(x.to(weight.dtype), weight[:, :n])

    def last(self, second: Tensor, weights: PerLayer, biases: PerLayer) -> Tensor:
        """The network's output, in the dtype of the last bias, from the second ReLU's output."""
        return conv3x3(second, weights[2]).to(biases[2].dtype) + biases[2]

    @staticmethod
    def fold(nets: Sequence["GlowConditioner"]) -> list[Folded]:
        """Fold the actnorms of n networks of one shape into the convolutions before them.

        This takes a few batched operations. One network at a time, the many small operations would
        take a noticeable part of a training step.
        """
        scales_in, biases_in = scales_and_biases(
            [net.norm_in.log_scale for net in nets],
            [net.norm_in.bias for net in nets],
            nets[0].log_scale_factor,
        )
        scales_mid, biases_mid = scales_and_biases(
            [net.norm_mid.log_scale for net in nets],
            [net.norm_mid.bias for net in nets],
            nets[0].log_scale_factor,
        )
        scales_out, biases_out = scales_and_biases(
            [net.conv_out.log_scale for net in nets], [net.conv_out.shift for net in nets]
        )
        scales = zip(scales_in.unbind(), scales_mid.unbind(), scales_out.unbind(), strict=True)
        biases = zip(biases_in.unbind(), biases_mid.unbind(), biases_out.unbind(), strict=True)
        return [
            net._folded(own_scales, own_biases)
            for net, own_scales, own_biases in zip(nets, scales, biases, strict=True)
        ]

    def _folded(self, scales: PerLayer, biases: PerLayer) -> Folded:
        return Folded(
            weight_in=self.conv_in.weight,
            scale_in=scales[0],
            bias_in=biases[0],
            edge_in=self.conv_in.edge_weight,
            weight_mid=self.conv_mid.weight,
            scale_mid=scales[1],
            bias_mid=biases[1],
            weight_out=self.conv_out.weight,
            scale_out=scales[2],
            bias_out=biases[2],
            edge_out=self.conv_out.edge_weight,
        )

    @staticmethod
    def weights(folded: Folded, dtype: torch.dtype) -> PerLayer:
        """(hidden, C_in, 3, 3), (hidden, hidden) and (C_out, hidden, 3, 3)."""
        return (
            scaled(folded.weight_in, folded.scale_in, dtype),
            scaled(folded.weight_mid.flatten(1), folded.scale_mid, dtype),
            scaled(folded.weight_out, folded.scale_out, dtype),
        )

    @staticmethod
    def biases(folded: Folded, dtype: torch.dtype, size: tuple[int, int]) -> PerLayer:
        """(hidden, H, W), (hidden,) and (C_out, H, W); without edges H = W = 1.

        The last one is float32 or better, whatever `dtype` is. size: (H, W) of the images.
        """
        return (
            scaled_bias(folded.bias_in, folded.edge_in, folded.scale_in, size).to(dtype),
            folded.bias_mid.to(dtype),
            scaled_bias(folded.bias_out, folded.edge_out, folded.scale_out, size),
        )

    def _layers(self, dtype: torch.dtype, size: tuple[int, int]) -> tuple[PerLayer, PerLayer]:
        """`weights` and `biases` of this network."""
        (folded,) = self.fold([self])
        with torch.autocast(self.conv_mid.weight.device.type, enabled=False):
            return self.weights(folded, dtype), self.biases(folded, dtype, size)

    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        hidden: tuple[Tensor, Tensor],
        weights: PerLayer,
        folded: Folded,
        context: Tensor | None = None,
        needs_context: bool = False,
    ) -> tuple[Tensor, Tensor | None, Folded]:
        """The gradients of x, context and every tensor in `folded`, from that of the output.

        They follow by the chain rule from the last layer to the first. hidden: the outputs of both
        ReLUs. needs_context: whether to compute the gradient of the context; if not, it is None.
        """
        first, second = hidden
        bias_out, edge_out, edge_scale_out = self.conv_out.bias_gradients(
            grad, folded.edge_out, folded.scale_out
        )
        grad, weight_out = conv3x3_gradients(grad.to(second.dtype), second, weights[2])
        grad = pixels(relu_gradient(grad, second))
        bias_mid = grad.sum(0, dtype=folded.bias_mid.dtype)
        weight_mid = grad.T @ pixels(first)
        grad = relu_gradient(images(grad @ weights[1], first), first)
        bias_in, edge_in, edge_scale_in = self.conv_in.bias_gradients(
            grad, folded.edge_in, folded.scale_in
        )
        grad, grad_context, weight_in = self._first_gradients(
            grad, x.to(first.dtype), context, weights[0], needs_context
        )
        weight_in, scale_in = scaled_gradients(weight_in, folded.weight_in, folded.scale_in)
        weight_mid, scale_mid = scaled_gradients(
            weight_mid.view_as(folded.weight_mid), folded.weight_mid, folded.scale_mid
        )
        weight_out, scale_out = scaled_gradients(weight_out, folded.weight_out, folded.scale_out)
        if edge_scale_in is not None:
            scale_in = scale_in + edge_scale_in
        if edge_scale_out is not None:
            scale_out = scale_out + edge_scale_out
        return (
            grad,
            grad_context,
            Folded(
                weight_in=weight_in,
                scale_in=scale_in,
                bias_in=bias_in,
                edge_in=edge_in,
                weight_mid=weight_mid,
                scale_mid=scale_mid,
                bias_mid=bias_mid,
                weight_out=weight_out,
                scale_out=scale_out,
                bias_out=bias_out,
                edge_out=edge_out,
            ),
        )

    def _first_gradients(
        self,
        grad: Tensor,
        x: Tensor,
        context: Tensor | None,
        weight: Tensor,
        needs_context: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The gradients of x, context and weight, from that of the output of `_first`."""
        if context is None:
            grad_x, grad_weight = conv3x3_gradients(grad, x, weight)
            return grad_x, None, grad_weight
        n = x.shape[1]
        grad_context, grad_weight, _ = convolution_gradients(
            grad, context.to(x.dtype), weight[:, n:], (needs_context, True, False)
        )
        if not n:
            return x, grad_context, grad_weight
        grad_x, own_weight = conv3x3_gradients(grad, x, weight[:, :n])
        return grad_x, grad_context, torch.cat([own_weight, grad_weight], dim=1)

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set each actnorm from the batch that reaches it; nothing is folded here."""
        inputs = x
        if self.context_channels:
            inputs = torch.cat([x, cast(Tensor, context)], dim=1)
        h = self.norm_in.initialize(self.conv_in(inputs)).relu()
        self.norm_mid.initialize(self.conv_mid(h))


def dtype_of_products(x: Tensor) -> torch.dtype:
    """The dtype of autocast if it is on, else that of x; float64 stays, as autocast leaves it."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
