"""Tiles with an overlap, in which images are computed that are too large to be computed at once."""

from typing import NamedTuple

import torch
from torch import Tensor

EDGE = 0.25  # the share of an overlap that does not count in a tile, at its border
TINY = 1e-12
LEVELS = 255  # the largest grey level; images in [0, 1] are grey levels over it


class Tile(NamedTuple):
    """A part of an image, in pixels: rows from `top` to below `bottom`, and columns."""

    top: int
    bottom: int
    left: int
    right: int

    def times(self, factor: int) -> "Tile":
        """The same part of an image that is `factor` times as high and wide."""
        return Tile(*(factor * bound for bound in self))

    def of(self, image: Tensor) -> Tensor:
        """This part of an image (..., H, W)."""
        return image[..., self.top : self.bottom, self.left : self.right]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.bottom - self.top, self.right - self.left


def tiles(size: tuple[int, int], side: int, overlap: int, multiple: int) -> list[Tile]:
    """The tiles of an image, row by row.

    size: the height and width of the image. side: the largest side of a tile; 0: one tile. overlap:
    how many pixels neighbouring tiles have in common, at least. All of them are multiples of
    `multiple`, and so are the bounds of the tiles.

    >>> [tuple(tile) for tile in tiles((8, 14), side=8, overlap=2, multiple=2)]
    [(0, 8, 0, 8), (0, 8, 6, 14)]
    """
    rows = spans(size[0], side, overlap, multiple)
    columns = spans(size[1], side, overlap, multiple)
    return [Tile(*row, *column) for row in rows for column in columns]


def spans(length: int, side: int, overlap: int, multiple: int) -> list[tuple[int, int]]:
    """The bounds of as few tiles as possible along one axis, evenly spaced.

    >>> spans(20, side=8, overlap=2, multiple=2)
    [(0, 8), (6, 14), (12, 20)]
    >>> spans(6, side=8, overlap=2, multiple=2)
    [(0, 6)]
    """
    if side == 0 or length <= side:
        return [(0, length)]
    n = -(-(length - overlap) // (side - overlap))
    starts = [(length - side) * k // ((n - 1) * multiple) * multiple for k in range(n)]
    return [(start, start + side) for start in starts]


class Blend:
    """An image that is put together of tiles: their weighted mean where they overlap.

    Near the border of its tile a pixel is computed without what lies beyond, so the outermost
    EDGE of an overlap does not count. From there on the weight grows linearly, so that there are no
    steps. At the border of the image all pixels count.

    shape: (..., H, W) of the image. overlap: of the tiles, in its pixels.
    """

    def __init__(self, shape: tuple[int, ...], overlap: int) -> None:
        self.overlap = overlap
        self.total = torch.zeros(shape)
        self.weight = torch.zeros(shape[-2:])
        self.difference = 0.0  # weighted sum of the differences of tiles, in grey levels
        self.compared = 0.0  # the sum of the weights

    def add(self, tile: Tile, image: Tensor) -> None:
        """Add a tile: its place, and its values in [0, 1], (..., height, width)."""
        height, width = self.weight.shape
        rows = weights(tile.top, tile.bottom, height, self.overlap)
        columns = weights(tile.left, tile.right, width, self.overlap)
        weight = rows[:, None] * columns
        total = tile.of(self.total)
        earlier = tile.of(self.weight)
        common = earlier * weight / (earlier + weight).clamp(min=TINY)
        difference = (image - total / earlier.clamp(min=TINY)).abs()
        difference = difference.flatten(0, -3).mean(0).nan_to_num(0.0, 0.0, 0.0)
        self.difference += LEVELS * (common * difference).sum().item()
        self.compared += common.sum().item()
        total += torch.where(weight > 0, weight * image, 0.0)
        earlier += weight

    def image(self) -> Tensor:
        """The whole image, once all tiles are there."""
        return self.total / self.weight

    def mean_difference(self) -> float:
        """By how many grey levels tiles differ where they overlap, on average; 0 for one tile.

        A pixel counts as much as it counts in both tiles.
        """
        if not self.compared:
            return 0.0
        return self.difference / self.compared


def weights(start: int, stop: int, length: int, overlap: int) -> Tensor:
    """The weights of the pixels from `start` to below `stop` of a tile, along one axis.

    length: of the image along this axis.

    >>> weights(0, 8, length=20, overlap=4)
    tensor([1.0000, 1.0000, 1.0000, 1.0000, 1.0000, 0.7500, 0.2500, 0.0000])
    """
    position = torch.arange(start, stop) + 0.5
    distance = torch.full_like(position, length)
    if start > 0:
        distance = torch.minimum(distance, position - start)
    if stop < length:
        distance = torch.minimum(distance, stop - position)
    edge = EDGE * overlap
    return ((distance - edge) / max(overlap - 2 * edge, TINY)).clamp(0.0, 1.0)
