"""Which elements a coupling keeps: 1 where they are kept, 0 where they are changed."""

import torch
from torch import Tensor, nn

from flows.constants import FixedBuffers, constant


def checkerboard(height: int, width: int, parity: int) -> Tensor:
    """(H, W) of 0 and 1: (parity + row + column) mod 2, so parity 1 has a 1 at the top left (paper, figure 3)."""
    rows = torch.arange(height)[:, None]
    columns = torch.arange(width)
    return ((parity + rows + columns) % 2).to(torch.get_default_dtype())


class Checkerboard(nn.Module):
    """A `checkerboard` of the size of the images at hand."""

    def __init__(self, parity: int) -> None:
        super().__init__()
        self.parity = parity

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns (H, W)."""
        return constant(checkerboard, *x.shape[-2:], self.parity, like=x)

    def complement(self) -> "Checkerboard":
        """1 where this one is 0."""
        return Checkerboard(1 - self.parity)


class FixedMask(FixedBuffers):
    """A mask that is the same for all data, broadcast over the batch: (D,) for points, (1, H, W) for images.

    mask: a tensor, or its values as a list. RuntimeError, one line, at `to_empty()`: the mask was a tensor on the meta
    device, whose values nobody knows.
    """

    def __init__(self, mask: Tensor | list[float]) -> None:
        super().__init__()
        self.register_buffer("mask", torch.as_tensor(mask), persistent=False)
        known = isinstance(mask, Tensor) and not mask.is_meta
        self.values = mask.tolist() if known else mask

    def fixed_values(self) -> dict[str, Tensor]:
        if isinstance(self.values, Tensor):
            raise RuntimeError(
                "the values of a mask on the meta device are not known: build the mask on the CPU"
            )
        return {"mask": torch.tensor(self.values)}

    def forward(self, x: Tensor) -> Tensor:
        return self.mask


def as_mask(mask: Tensor | list[float] | nn.Module) -> nn.Module:
    """A module that gives the mask for x: a tensor, or its values, becomes a `FixedMask`."""
    return mask if isinstance(mask, nn.Module) else FixedMask(mask)
