"""Which elements a coupling keeps: 1 where they are kept, 0 where they are changed."""

import torch
from torch import Tensor, nn

from flows.constants import FixedBuffers, constant


def checkerboard(height: int, width: int, parity: int) -> Tensor:
    """(H, W) of 0 and 1: (parity + row + column) mod 2 (Dinh et al. 2017, figure 3).

    Parity 1 has a 1 at the top left:

    >>> checkerboard(2, 3, parity=1)
    tensor([[1., 0., 1.],
            [0., 1., 0.]])
    """
    rows = torch.arange(height)[:, None]
    columns = torch.arange(width)
    return ((parity + rows + columns) % 2).to(torch.get_default_dtype())


class Checkerboard(nn.Module):
    """A `checkerboard` mask of the same size as the images it is called with."""

    def __init__(self, parity: int) -> None:
        super().__init__()
        self.parity = parity

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns (H, W)."""
        return constant(checkerboard, *x.shape[-2:], self.parity, like=x)

    def complement(self) -> "Checkerboard":
        """The mask that is 1 where this one is 0."""
        return Checkerboard(1 - self.parity)


class FixedMask(FixedBuffers):
    """A mask that is the same for all data, broadcast over the batch.

    mask: (D,) for points, (1, H, W) for images; a tensor, or its values as a list.

    Raises RuntimeError at `to_empty()` if the mask was a tensor on the meta device, which has no
    values.
    """

    mask: Tensor

    def __init__(self, mask: Tensor | list[float]) -> None:
        super().__init__()
        self.register_buffer("mask", torch.as_tensor(mask), persistent=False)
        self.values: list[float] | None
        if self.mask.is_meta and isinstance(mask, Tensor):
            self.values = None
        else:
            self.values = torch.as_tensor(mask, device="cpu").tolist()

    def fixed_values(self) -> dict[str, Tensor]:
        if self.values is None:
            raise RuntimeError(
                "the mask was built on the meta device and has no values: build the mask on the CPU"
            )
        return {"mask": torch.tensor(self.values)}

    def forward(self, x: Tensor) -> Tensor:
        return self.mask


Mask = Tensor | list[float] | nn.Module


def as_mask(mask: Mask) -> nn.Module:
    """A module that returns the mask for x; a tensor or a list becomes a `FixedMask`."""
    return mask if isinstance(mask, nn.Module) else FixedMask(mask)
