"""The sets of whole images on which super-resolution is evaluated, in the folders that hold them.

An image is not resized. Of its right and lower border as few pixels are left out as make its sides
multiples of the scale, so that an image of the set differs between scales.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.image_files import find_images, read_whole, shown


class Known(NamedTuple):
    """What a set of the literature is.

    n: its number of images. folders: where it may lie below the root; the first that exists counts.
    """

    n: int
    folders: Sequence[str]


KNOWN = {
    "Set5": Known(5, ("Set5",)),
    "Set14": Known(14, ("Set14",)),
    "BSD100": Known(100, ("BSD100", "BSDS500/val")),  # the test images of BSDS300: BSDS500's val
    "Kodak24": Known(24, ("Kodak24",)),
    "DIV2K": Known(100, ("DIV2K_valid_HR", "DIV2K/DIV2K_valid_HR")),
}


class EvaluationSet:
    """The images of a folder, for a scale.

    root: the folder that has the set's folder. name: one of KNOWN, or any folder below the root.
    scale: a whole number of at least 1.
    Raises FileNotFoundError: the set is not there. Raises ValueError: its folder has no images, or
    is one of KNOWN with another number of images.
    """

    def __init__(self, root: Path, name: str, scale: int) -> None:
        self.name = name
        self.scale = scale
        folders: Sequence[str] = (name,)
        if name in KNOWN:
            folders = KNOWN[name].folders
        existing = [root / folder for folder in folders if (root / folder).is_dir()]
        if not existing:
            raise FileNotFoundError(
                f"{name} is not in {shown(root)}: put its images into a folder "
                f"{' or '.join(folders)} there"
            )
        self.folder = existing[0]
        self.paths = find_images(self.folder)
        if name in KNOWN and len(self.paths) != KNOWN[name].n:
            raise ValueError(
                f"{shown(self.folder)} has {len(self.paths)} images, but {name} has "
                f"{KNOWN[name].n}: leave the set's own images in it, in full resolution"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Tensor]:
        """The images in the order of their names, each (3, H, W) uint8 of a size of its own.

        UnreadableImage: a file cannot be read. ValueError: an image is smaller than the scale.
        """
        for path in self.paths:
            image = cropped(torch.from_numpy(read_whole(path, channels=3)), self.scale)
            if not image.numel():
                raise ValueError(
                    f"{shown(path)} has a side of less than {self.scale} pixels: take it away, or "
                    "give a smaller scale"
                )
            yield image


def cropped(image: Tensor, scale: int) -> Tensor:
    """The upper left part of an image (..., H, W) whose sides are multiples of the scale.

    >>> tuple(cropped(torch.zeros(3, 10, 13), scale=4).shape)
    (3, 8, 12)
    """
    height = image.shape[-2] // scale * scale
    width = image.shape[-1] // scale * scale
    return image[..., :height, :width]


class Hash:
    """A SHA-256 of images in their order, by which two evaluations name the same images."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, image: Tensor) -> None:
        """Add an image, (C, H, W) uint8."""
        self._hash.update(f"{tuple(image.shape)}\n".encode())
        self._hash.update(image.contiguous().numpy().tobytes())

    def digest(self) -> str:
        """64 hexadecimal digits."""
        return self._hash.hexdigest()
