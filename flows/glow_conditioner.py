"""The network in Glow's couplings, and the convolutions it shares with Glow's priors."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.caching import once
from flows.convolution import add_relu, conv3x3
from flows.normalization import ActNorm, scales_and_biases
from flows.recompute import reused


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


class Edge(nn.Module):
    """What a 3x3 convolution of one channel makes of a padding of ones around zeros, (C_out, H, W), float32."""

    def __init__(self, out_channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.zeros(out_channels, 1, 3, 3))
        border = F.pad(torch.zeros(1, 1, *size), (1, 1, 1, 1), value=1.0)
        self.register_buffer("border", F.unfold(border, 3)[0].T.contiguous(), persistent=False)  # (H W, 9)

    def forward(self) -> Tensor:
        weight = self.weight.flatten(1)
        with torch.autocast(weight.device.type, enabled=False):
            return F.linear(self.border, weight).unflatten(0, self.size).movedim(-1, 0)


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
        (scale,), (shift,) = folded_factors([self])
        return self.weight * scale[:, None, None, None], shift


def folded_factors(convs: list[nn.Module]) -> tuple[Tensor, list[Tensor]]:
    """exp(3 s), (n, C_out), and (e + b) exp(3 s), n times (C_out, H, W) or (C_out, 1, 1).

    Of n layers of one shape with `shift` b, `log_scale` s and `edge`, or None: `ZeroConv2d`s, or a prior.
    """
    scales = torch.exp(3 * torch.stack([conv.log_scale.flatten() for conv in convs]))
    return scales, folded_edges(convs, scales, torch.stack([conv.shift.flatten() for conv in convs]) * scales)


def folded_edges(convs: list[nn.Module], scales: Tensor, biases: Tensor) -> list[Tensor]:
    """What is left to add once the weights W of n convolutions are scaled: (W x + e) s + b = (W s) x + (e s + b)."""
    edges = [conv.edge for conv in convs]
    if edges[0] is None:
        return list(biases[..., None, None].unbind())
    weights = torch.stack([edge.weight.flatten(1) for edge in edges]) * scales[..., None]
    border = edges[0].border.expand(len(edges), -1, -1)
    with torch.autocast(weights.device.type, enabled=False):
        maps = torch.baddbmm(biases[:, None], border, weights.mT).unflatten(1, edges[0].size)
    return [pixels.movedim(-1, 0) for pixels in maps.unbind()]  # in this order gradients come together uncopied


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

    def forward(self, x: Tensor, folded: tuple[Tensor, ...] | None = None) -> Tensor:
        """folded: what `fold` gave for this network, where it was made together with others'."""
        weight_in, bias_in, weight_mid, bias_mid, weight_out, shift = once(
            self, "weights", lambda: self._weights(*(folded or self.fold([self])[0]))
        )
        h = add_relu(conv3x3(x, weight_in), bias_in)
        pixels = h.movedim(1, -1).flatten(0, -2)  # a view of channels_last images: the 1x1 is a matrix product
        pixels = add_relu(F.linear(pixels, weight_mid), bias_mid)
        h = pixels.unflatten(0, (len(x), *x.shape[2:])).movedim(-1, 1)
        return reused(lambda known: conv3x3(h, weight_out, known)).to(shift.dtype) + shift

    @staticmethod
    def fold(nets: list["GlowConditioner"]) -> list[tuple[Tensor, ...]]:
        """For each of n networks of one shape: a factor of its weights, and what is added, for each of its layers.

        At once: n times a few small operations are a twentieth of the time of a step at K=8, H=128.
        """
        convs = [net.conv_in for net in nets]
        scale_in, bias_in = scales_and_biases([net.norm_in for net in nets])
        scale_mid, bias_mid = scales_and_biases([net.norm_mid for net in nets])
        scale_out, shift = folded_factors([net.conv_out for net in nets])
        folded_in = scale_in.unbind(), folded_edges(convs, scale_in, bias_in)
        return list(zip(*folded_in, scale_mid.unbind(), bias_mid.unbind(), scale_out.unbind(), shift, strict=True))

    def _weights(self, scale_in, bias_in, scale_mid, bias_mid, scale_out, shift) -> tuple[Tensor, ...]:
        """Weight and bias of each layer."""
        return (
            self.conv_in.weight * scale_in[:, None, None, None],
            bias_in,
            self.conv_mid.weight.flatten(1) * scale_mid[:, None],
            bias_mid,
            self.conv_out.weight * scale_out[:, None, None, None],
            shift,
        )

    def initialize(self, x: Tensor) -> None:
        """Set both actnorms from what comes to them; here they are not folded."""
        h = self.norm_in.initialize(self.conv_in(x)).relu()
        self.norm_mid.initialize(self.conv_mid(h))
