"""Convolutions that know where the border is, and layers that start at zero: of Glow's networks and priors."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.caching import once
from flows.constants import constant
from flows.glow.kernels import conv3x3, pixels, scaled, scaled_gradients
from flows.normalization import scales_and_biases


class EdgeConv2d(nn.Conv2d):
    """A 3x3 "same" convolution without bias that knows where the border is; weights N(0, .05).

    The authors of Glow pad with zeros and append a channel that is 1 on the padding and 0 inside (`add_edge_padding`).
    Its convolution does not depend on the image: here it is a map, (C_out, H, W), added to every one.

    edges: whether the border is marked; public ports leave it out.
    """

    def __init__(self, in_channels: int, out_channels: int, edges: bool) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)
        self.edge = Edge(out_channels) if edges else None
        self.reset()

    def reset(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.05)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, padding=1)
        return y if self.edge is None else y + self.edge(x.shape[-2:])

    @property
    def edge_weight(self) -> Tensor | None:
        """The border's weight, (C_out, 1, 3, 3), or None without edges."""
        return None if self.edge is None else self.edge.weight

    def added_gradients(
        self, grad: Tensor, edge: Tensor | None, scale: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Those of bias, edge and scale, from that of images, (B, C_out, H, W), to which `added` was added."""
        if edge is None:
            return pixels(grad).sum(0, dtype=scale.dtype), None, None
        # over the batch in rows: ten times faster than as autograd writes the sum of channels_last gradients
        of_map = (
            grad.permute(0, 2, 3, 1).flatten(1).sum(0, dtype=scale.dtype).view(-1, grad.shape[1])
        )
        of_weight = (of_map.T @ border(*grad.shape[-2:], like=scale)).view_as(edge)
        return of_map.sum(0), *scaled_gradients(of_weight, edge, scale)


class Edge(nn.Module):
    """What a 3x3 convolution of one channel makes of a padding of ones around zeros, (C_out, H, W), float32."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_channels, 1, 3, 3))

    def forward(self, size: tuple[int, int]) -> Tensor:
        """size: (H, W) of the images."""
        return edge_map(self.weight.flatten(1), None, size)


def border(height: int, width: int, like: Tensor) -> Tensor:
    """The 3x3 patch of every pixel in a padding of ones around zeros, (H W, 9), as `like` in dtype and device."""
    return constant(_border, height, width, like=like)


def _border(height: int, width: int) -> Tensor:
    padded = F.pad(torch.zeros(1, 1, height, width), (1, 1, 1, 1), value=1.0)
    return F.unfold(padded, 3)[0].T.contiguous()


def edge_map(weight: Tensor, bias: Tensor | None, size: tuple[int, int]) -> Tensor:
    """The border's convolution with a weight (C_out, 9), plus a bias (C_out,), for images of size (H, W)."""
    with torch.autocast(weight.device.type, enabled=False):
        return F.linear(border(*size, like=weight), weight, bias).view(*size, -1).permute(2, 0, 1)


def added(bias: Tensor, edge: Tensor | None, scale: Tensor, size: tuple[int, int]) -> Tensor:
    """What is left to add where the rows of an `EdgeConv2d`'s weight are scaled, (C_out, H, W) or (C_out, 1, 1).

        (W x + e) s + b = (W s) x + (e s + b)

    bias b and scale s: (C_out,). edge: the border's weight, (C_out, 1, 3, 3), or None without edges. size: (H, W).
    """
    return (
        bias[:, None, None]
        if edge is None
        else edge_map(edge.flatten(1) * scale[:, None], bias, size)
    )


class ZeroConv2d(EdgeConv2d):
    """(conv(x) + b) exp(3 s), with all weights, b and s 0 at first: what starts from it starts as the identity.

    Authors' code, `conv2d_zeros`. The bias is added in float32: bfloat16 would round what the couplings rest on.
    """

    def __init__(self, in_channels: int, out_channels: int, edges: bool) -> None:
        super().__init__(in_channels, out_channels, edges)
        self.shift = nn.Parameter(torch.zeros(out_channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(out_channels, 1, 1))

    def reset(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        size = tuple(x.shape[-2:])
        weight, shift = once(self, "folded", lambda: self._folded(size), size)
        return conv3x3(x, weight).to(shift.dtype) + shift

    def _folded(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Weight and shift with the factor inside, for images of size (H, W)."""
        (scale,), (bias,) = scales_and_biases([self.log_scale], [self.shift])
        return scaled(self.weight, scale, self.weight.dtype), added(
            bias, self.edge_weight, scale, size
        )


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
