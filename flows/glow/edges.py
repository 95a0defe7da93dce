"""Convolutions that know where the border is, and layers that start at zero: of Glow's networks and priors."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.caching import once
from flows.glow.kernels import conv3x3, pixels, scaled, scaled_gradients
from flows.normalization import scales_and_biases


class EdgeConv2d(nn.Conv2d):
    """A 3x3 "same" convolution without bias that knows where the border is; weights N(0, .05).

    The authors of Glow pad with zeros and append a channel that is 1 on the padding and 0 inside (`add_edge_padding`).
    Its convolution does not depend on the image: here it is a map, (C_out, H, W), added to every one.

    edges: (H, W) of the images whose border is marked. None: public ports leave it out.
    """

    def __init__(self, in_channels: int, out_channels: int, edges: tuple[int, int] | None) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)
        self.edge = Edge(out_channels, edges) if edges else None
        self.reset()

    def reset(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.05)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, padding=1)
        return y if self.edge is None else y + self.edge()

    @property
    def edge_weight(self) -> Tensor | None:
        """The border's weight, (C_out, 1, 3, 3), or None without edges."""
        return None if self.edge is None else self.edge.weight

    def added(self, bias: Tensor, edge: Tensor | None, scale: Tensor) -> Tensor:
        """What is left to add where the weight's rows are scaled, (C_out, H, W) or (C_out, 1, 1).

        (W x + e) s + b = (W s) x + (e s + b): bias b and scale s (C_out,), edge the border's weight (C_out, 1, 3, 3).
        """
        return added(self.edge, bias, edge, scale)

    def added_gradients(
        self, grad: Tensor, edge: Tensor | None, scale: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Those of bias, edge and scale, from that of images, (B, C_out, H, W), to which it was added."""
        if edge is None:
            return pixels(grad).sum(0, dtype=scale.dtype), None, None
        # over the batch in rows: ten times faster than as autograd writes the sum of channels_last gradients
        of_map = grad.permute(0, 2, 3, 1).flatten(1).sum(0, dtype=scale.dtype).view(-1, grad.shape[1])
        of_weight = (of_map.T @ self.edge.border).view_as(edge)
        return of_map.sum(0), *scaled_gradients(of_weight, edge, scale)


class Edge(nn.Module):
    """What a 3x3 convolution of one channel makes of a padding of ones around zeros, (C_out, H, W), float32."""

    def __init__(self, out_channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.zeros(out_channels, 1, 3, 3))
        border = F.pad(torch.zeros(1, 1, *size), (1, 1, 1, 1), value=1.0)
        self.register_buffer("border", F.unfold(border, 3)[0].T.contiguous(), persistent=False)  # (H W, 9)

    def forward(self) -> Tensor:
        return self.map(self.weight.flatten(1))

    def map(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same of a weight (C_out, 9), plus a bias (C_out,)."""
        with torch.autocast(weight.device.type, enabled=False):
            return F.linear(self.border, weight, bias).view(*self.size, -1).permute(2, 0, 1)


def added(border: Edge | None, bias: Tensor, edge: Tensor | None, scale: Tensor) -> Tensor:
    """`EdgeConv2d.added`, of any layer that holds an `Edge` or none."""
    return bias[:, None, None] if edge is None else border.map(edge.flatten(1) * scale[:, None], bias)


class ZeroConv2d(EdgeConv2d):
    """(conv(x) + b) exp(3 s), with all weights, b and s 0 at first: what starts from it starts as the identity.

    Authors' code, `conv2d_zeros`. The bias is added in float32: bfloat16 would round what the couplings rest on.
    """

    def __init__(self, in_channels: int, out_channels: int, edges: tuple[int, int] | None) -> None:
        super().__init__(in_channels, out_channels, edges)
        self.shift = nn.Parameter(torch.zeros(out_channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(out_channels, 1, 1))

    def reset(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        weight, shift = once(self, "folded", self._folded)
        return conv3x3(x, weight).to(shift.dtype) + shift

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Weight and shift with the factor inside."""
        (scale,), (bias,) = scales_and_biases([self.log_scale], [self.shift])
        return scaled(self.weight, scale, self.weight.dtype), self.added(bias, self.edge_weight, scale)


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
