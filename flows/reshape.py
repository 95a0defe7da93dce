"""Bijections that rearrange the elements of images: their log_det is 0."""

import torch
from torch import Tensor
from torch.nn import functional as F

from flows.base import Flow, no_log_det
from flows.constants import FixedBuffers


class Squeeze(Flow):
    """(C, H, W) -> (4C, H/2, W/2), channel index c*4 + dy*2 + dx (Dinh et al. 2017, figure 3).

    >>> z, log_det = Squeeze()(torch.arange(4.0).view(1, 1, 2, 2))
    >>> z.flatten()
    tensor([0., 1., 2., 3.])
    >>> z.shape, log_det
    (torch.Size([1, 4, 1, 1]), tensor([0.]))
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return unshuffled(x), no_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return shuffled(z), no_log_det(z)


class OrderedSqueeze(FixedBuffers, Flow):
    """(C, H, W) -> (4C, H/2, W/2), where each half of the channels is one colour of a checkerboard.

    The new channels are [TL of all c | BR of all c | TR of all c | BL of all c], where TL is the
    top left pixel of a 2x2 block, BR the bottom right one, and so on. RealNVP factors out half of
    the channels after this squeeze, not after a plain `Squeeze` (authors' code; the paper's section
    3.6 does not say).

    >>> z, _ = OrderedSqueeze(1)(torch.arange(4.0).view(1, 1, 2, 2))
    >>> z.flatten()
    tensor([0., 3., 1., 2.])
    """

    CORNERS = (0, 3, 1, 2)  # TL, BR, TR, BL as dy*2 + dx

    order: Tensor
    inverse_order: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        for name, value in self.fixed_values().items():
            self.register_buffer(name, value, persistent=False)

    def fixed_values(self) -> dict[str, Tensor]:
        channels = range(self.channels)
        order = torch.tensor([4 * c + corner for corner in self.CORNERS for c in channels])
        return {"order": order, "inverse_order": order.argsort()}

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return reordered(unshuffled(x), self.order), no_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return shuffled(reordered(z, self.inverse_order)), no_log_det(z)


def unshuffled(x: Tensor) -> Tensor:
    """`Squeeze`'s map, (B, C, H, W) to (B, 4C, H/2, W/2), also for B = 0.

    torch's function returns an empty batch as it is, and so does the gradient of its inverse.
    """
    if len(x):
        return F.pixel_unshuffle(x, 2)
    _, channels, height, width = x.shape
    return x.reshape(0, 4 * channels, height // 2, width // 2)


def shuffled(z: Tensor) -> Tensor:
    """The inverse of `unshuffled`: (B, 4C, H/2, W/2) to (B, C, H, W), also for B = 0."""
    if len(z):
        return F.pixel_shuffle(z, 2)
    _, channels, height, width = z.shape
    return z.reshape(0, channels // 4, 2 * height, 2 * width)


def reordered(x: Tensor, order: Tensor) -> Tensor:
    """x[:, order], computed so that channels_last images stay channels_last."""
    return x.movedim(1, -1)[..., order].movedim(-1, 1)


def factor_out(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split the channels (Dinh et al. 2017, section 3.6).

    Returns the first half, which goes on to the next scale, and the second half, which is latent.
    """
    first, second = x.chunk(2, dim=1)
    return first, second


def factor_in(x: Tensor, z: Tensor) -> Tensor:
    """Join two halves of the channels: the inverse of `factor_out`."""
    return torch.cat([x, z], dim=1)
