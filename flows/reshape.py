"""Bijections that move pixels and change no value: log_det is 0."""

import torch
from torch import Tensor
from torch.nn import functional as F

from flows.base import Flow, no_log_det
from flows.constants import FixedBuffers


class Squeeze(Flow):
    """(C, H, W) -> (4C, H/2, W/2), channel index c*4 + dy*2 + dx (Dinh et al. 2017, figure 3)."""

    def forward(self, x: Tensor, context=None) -> tuple[Tensor, Tensor]:
        return F.pixel_unshuffle(x, 2), no_log_det(x)

    def inverse(self, z: Tensor, context=None) -> tuple[Tensor, Tensor]:
        return F.pixel_shuffle(z, 2), no_log_det(z)


class OrderedSqueeze(FixedBuffers, Flow):
    """(C, H, W) -> (4C, H/2, W/2) in the order that lets half of the channels be one colour of a checkerboard.

    The new channels are [TL of all c | BR of all c | TR of all c | BL of all c], where TL is the top left pixel of a
    2x2 block: the first half is one colour of the checkerboard and the second half the other. RealNVP factors out
    after this squeeze, not after the plain one (authors' code; the paper's section 3.6 does not say).
    """

    CORNERS = (0, 3, 1, 2)  # TL, BR, TR, BL as dy*2 + dx

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        for name, order in self.fixed_values().items():
            self.register_buffer(name, order, persistent=False)

    def fixed_values(self) -> dict[str, Tensor]:
        channels = range(self.channels)
        order = torch.tensor([4 * c + corner for corner in self.CORNERS for c in channels])
        return {"order": order, "unorder": order.argsort()}

    def forward(self, x: Tensor, context=None) -> tuple[Tensor, Tensor]:
        return channels(F.pixel_unshuffle(x, 2), self.order), no_log_det(x)

    def inverse(self, z: Tensor, context=None) -> tuple[Tensor, Tensor]:
        return F.pixel_shuffle(channels(z, self.unorder), 2), no_log_det(z)


def channels(x: Tensor, order: Tensor) -> Tensor:
    """x[:, order], channels_last: indexing the second dimension would make it contiguous."""
    return x.movedim(1, -1)[..., order].movedim(-1, 1)


def factor_out(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split the channels: the first half goes on to the next scale, the second half is latent (section 3.6)."""
    return x.chunk(2, dim=1)


def factor_in(x: Tensor, z: Tensor) -> Tensor:
    """The inverse of `factor_out`."""
    return torch.cat([x, z], dim=1)
