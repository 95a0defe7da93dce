"""Convolutions that know where the border of the image is, and layers that start at zero.

Glow's networks and priors are built from them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.caching import once
from flows.constants import constant
from flows.glow.kernels import conv3x3, pixels, scaled, scaled_gradients, size_of
from flows.normalization import scales_and_biases


class EdgeConv2d(nn.Conv2d):
    """A 3x3 "same" convolution without bias that knows where the border of the image is.

    The authors of Glow pad with zeros and append a channel that is 1 on the padding and 0 inside
    (`add_edge_padding`). The convolution of that channel does not depend on the image, so here it
    is a map, (C_out, H, W), that is added to the convolution of the image. Initial weights are
    normal with standard deviation .05.

    edges: whether to mark the border in this way; public ports of Glow do not.
    """

    edge: "Edge | None"

    def __init__(self, in_channels: int, out_channels: int, edges: bool) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)
        self.edge = Edge(out_channels) if edges else None
        self.reset()

    def reset(self) -> None:
        """Draw the initial weights."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.05)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, padding=1)
        if self.edge is None:
            return y
        return y + self.edge(size_of(x))

    @property
    def edge_weight(self) -> Tensor | None:
        """The border's weight, (C_out, 1, 3, 3), or None without edges."""
        return None if self.edge is None else self.edge.weight

    def bias_gradients(
        self, grad: Tensor, edge: Tensor | None, scale: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradients of the arguments bias, edge and scale of `scaled_bias`.

        Without edges, those of edge and scale are None.

        grad: the gradient of the images, (B, C_out, H, W), to which the scaled bias was added.
        """
        if edge is None:
            return pixels(grad).sum(0, dtype=scale.dtype), None, None
        # Summing one row per image is much faster than autograd's sum of channels_last gradients.
        rows = grad.permute(0, 2, 3, 1).flatten(1)
        grad_map = rows.sum(0, dtype=scale.dtype).view(-1, grad.shape[1])
        grad_weight = (grad_map.T @ border(*size_of(grad), like=scale)).view_as(edge)
        grad_edge, grad_scale = scaled_gradients(grad_weight, edge, scale)
        return grad_map.sum(0), grad_edge, grad_scale


class Edge(nn.Module):
    """The 3x3 convolution of an image that is 1 on the padding and 0 inside: (C_out, H, W)."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_channels, 1, 3, 3))

    def forward(self, size: tuple[int, int]) -> Tensor:
        """size: (H, W) of the images."""
        return edge_map(self.weight.flatten(1), None, size)


def border(height: int, width: int, like: Tensor) -> Tensor:
    """The 3x3 patch around every pixel of an image that is 1 on the padding and 0 inside.

    Returns (H W, 9), with the dtype and the device of `like`.
    """
    return constant(_border, height, width, like=like)


def _border(height: int, width: int) -> Tensor:
    padded = F.pad(torch.zeros(1, 1, height, width), (1, 1, 1, 1), value=1.0)
    return F.unfold(padded, 3)[0].T.contiguous()


def edge_map(weight: Tensor, bias: Tensor | None, size: tuple[int, int]) -> Tensor:
    """The convolution of `border` with a weight (C_out, 9), plus a bias (C_out,): (C_out, H, W)."""
    with torch.autocast(weight.device.type, enabled=False):
        return F.linear(border(*size, like=weight), weight, bias).view(*size, -1).permute(2, 0, 1)


def scaled_bias(bias: Tensor, edge: Tensor | None, scale: Tensor, size: tuple[int, int]) -> Tensor:
    """The bias e s + b of an `EdgeConv2d` whose output is scaled by s and shifted by b.

        (W x + e) s + b = (W s) x + (e s + b)

    e is the map of the border. bias b and scale s: (C_out,). edge: the border's weight,
    (C_out, 1, 3, 3), or None without edges. size: (H, W) of the images. Returns (C_out, H, W), or
    without edges (C_out, 1, 1).
    """
    if edge is None:
        return bias[:, None, None]
    return edge_map(edge.flatten(1) * scale[:, None], bias, size)


class ZeroConv2d(EdgeConv2d):
    """(conv(x) + b) exp(3 s), with all weights, b and s 0 at first (authors' code, `conv2d_zeros`).

    A flow whose parameters it computes is therefore a fixed simple map at first. The bias is added
    in float32, since bfloat16 would round the parameters of couplings and priors.

    >>> ZeroConv2d(3, 2, edges=True)(torch.rand(1, 3, 4, 4)).abs().max().item()
    0.0
    """

    def __init__(self, in_channels: int, out_channels: int, edges: bool) -> None:
        super().__init__(in_channels, out_channels, edges)
        self.shift = nn.Parameter(torch.zeros(out_channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(out_channels, 1, 1))

    def reset(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        size = size_of(x)
        weight, shift = once(self, "folded", lambda: self._folded(size), size)
        return conv3x3(x, weight).to(shift.dtype) + shift

    def _folded(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Weight and bias with the factor exp(3 s) folded in, for images of size (H, W)."""
        (scale,), (bias,) = scales_and_biases([self.log_scale], [self.shift])
        weight = scaled(self.weight, scale, self.weight.dtype)
        return weight, scaled_bias(bias, self.edge_weight, scale, size)


class ZeroLinear(nn.Linear):
    """(W x + b) exp(3 s), with W, b and s 0 at first (authors' code, `linear_zeros`)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.log_scale = nn.Parameter(torch.zeros(out_features))
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x) * torch.exp(3 * self.log_scale)
