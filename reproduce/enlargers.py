"""Trained models that enlarge images, and how they enlarge one of any size, tile by tile."""

from abc import ABC, abstractmethod
from typing import NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from omegaconf import OmegaConf
from torch import Tensor, nn

from flows.base import FlowModel
from flows.caching import cached
from flows.srflow import padded
from lightning_modules.numerics import report_failure
from lightning_modules.objective import Data
from lightning_modules.precision import evaluation
from lightning_modules.regression import RegressionModule
from lightning_modules.super_resolution import LEVELS, SuperResolutionModule
from reproduce.config import ConfigError
from reproduce.model import RecordedData, make_objective
from reproduce.stored import Stored
from reproduce.tiles import Blend, Tile, tiles

NO_INVERSE = (torch.linalg.LinAlgError, ArithmeticError)
Latents = tuple[Tensor, ...]


class Enlarger(ABC):
    """A model that makes images which are `scale` times as high and wide as the given ones.

    network: what is computed. multiple: of the sides of what it is given. n: how many images it
    makes of each.
    """

    network: nn.Module
    scale: int
    multiple: int
    n: int

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return next(self.network.parameters()).device

    @abstractmethod
    def begin(self, size: tuple[int, int]) -> None:
        """Draw what is random in the images of a low-resolution one of this height and width."""

    @abstractmethod
    def tile(self, low_res: Tensor, tile: Tile) -> Tensor:
        """A tile of the images, (n, 3, scale h, scale w), as far as they are computed from it.

        low_res: the tile of the low-resolution image, (3, h, w) in [0, 1]. tile: its place.
        """


class FlowEnlarger(Enlarger):
    """SRFlow: n samples of p(high_res | low_res). A tile that has no inverse is NaN.

    The latents of sample k are a function of (seed, k) and the size of the image. They are drawn
    for the whole image, so that two tiles have the same latents where they overlap, and the samples
    are nearly those that the image would get without tiles.

    temperature: the standard deviation of the latents.
    """

    def __init__(
        self, module: SuperResolutionModule, n: int, temperature: float, seed: int
    ) -> None:
        self.flow: FlowModel = module.flow
        self.network = self.flow
        self.scale = module.scale
        self.multiple = module.multiple
        self.n = n
        self.temperature = temperature
        self.seed = seed
        self.latents: list[Latents] = []
        self.height = 0  # of the images

    def begin(self, size: tuple[int, int]) -> None:
        self.height = self.scale * size[0]
        shapes = self.flow.latent_shapes((3, self.height, self.scale * size[1]))
        like = torch.zeros(0)
        self.latents = []
        for number in range(self.n):
            key = np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)[0]
            generator = torch.Generator().manual_seed(int(key))
            self.latents.append(self.flow.base.sample(1, shapes, self.temperature, generator, like))

    def tile(self, low_res: Tensor, tile: Tile) -> Tensor:
        encoding = self.flow.encode_context(low_res[None].to(self.device))
        images = []
        for latents in self.latents:  # one after the other, which takes the least memory
            parts = tuple(self._part(level, tile).to(self.device) for level in latents)
            try:
                image, _ = self.flow.inverse(parts, encoding)
            except NO_INVERSE as error:
                report_failure("a tile", error.with_traceback(None))
                shape = (1, 3, *tile.times(self.scale).size)
                image = torch.full(shape, torch.nan)
            images.append(image.cpu())
        return torch.cat(images)

    def _part(self, level: Tensor, tile: Tile) -> Tensor:
        """The latents of a tile at one level, (1, C, h, w)."""
        ratio = self.height // level.shape[-2]  # how often the flow has halved the images there
        return Tile(*(self.scale * bound // ratio for bound in tile)).of(level)


class NetworkEnlarger(Enlarger):
    """RRDB: one image for each low-resolution one."""

    multiple = 1
    n = 1

    def __init__(self, module: RegressionModule) -> None:
        self.network = module.network
        self.scale = module.scale

    def begin(self, size: tuple[int, int]) -> None:
        """Nothing is random."""

    def tile(self, low_res: Tensor, tile: Tile) -> Tensor:
        return self.network(low_res[None].to(self.device)).cpu()


def make_enlarger(
    stored: Stored, name: str, device: str, n: int, temperature: float | None, seed: int
) -> Enlarger:
    """The enlarger of trained weights, on a device.

    name: of the model, for a message. n, temperature, seed: of the samples of a flow; without a
    temperature it is the one at which its recipe tests it.

    ConfigError, one line: the model does not enlarge images, or the weights do not fit it.
    """
    config = OmegaConf.create(stored.origin["config"])
    objective = make_objective(stored, cast(Data, RecordedData(stored.origin)), config)
    objective.requires_grad_(False).eval().to(torch.device(device))
    if isinstance(objective, RegressionModule):
        return NetworkEnlarger(objective)
    if isinstance(objective, SuperResolutionModule):
        if temperature is None:
            temperature = objective.temperature
        return FlowEnlarger(objective, n, temperature, seed)
    raise ConfigError(
        f"{name} is of {stored.origin['experiment']}, which does not enlarge images: give a run of "
        "srflow_... or rrdb_..."
    )


class Enlarged(NamedTuple):
    """Images that were made of one.

    images: (n, 3, scale h, scale w), about in [0, 1], neither clipped nor rounded. n_tiles: in how
    many tiles they were computed. difference: by how many grey levels tiles differ where they
    overlap, as `Blend.mean_difference`.
    """

    images: Tensor
    n_tiles: int
    difference: float


def tiles_of(enlarger: Enlarger, low_res: Tensor, side: int, overlap: int) -> list[Tile]:
    """The tiles of a low-resolution image that is padded for a model.

    side, overlap: in pixels of the enlarged image; side 0: one tile.
    """
    unit = enlarger.scale * enlarger.multiple
    size = tuple(
        -(-length // enlarger.multiple) * enlarger.multiple for length in low_res.shape[1:]
    )
    least = enlarger.multiple * -(-overlap // unit)
    longest = 0
    if side:
        longest = enlarger.multiple * max(1, side // unit, 2 * least // enlarger.multiple)
    return tiles((size[0], size[1]), longest, least, enlarger.multiple)


@torch.no_grad()
def enlarge(
    enlarger: Enlarger, low_res: Tensor, side: int, overlap: int, bar: Tqdm | None = None
) -> Enlarged:
    """Enlarge an image, (3, h, w) uint8. side, overlap: as in `tiles_of`. bar: counts tiles.

    ConfigError, one line: a tile takes more memory than a GPU has.
    """
    scale = enlarger.scale
    whole, size = padded(low_res[None].float() / LEVELS, enlarger.multiple)
    parts = tiles_of(enlarger, low_res, side, overlap)
    shape = (enlarger.n, 3, scale * whole.shape[2], scale * whole.shape[3])
    blend = Blend(shape, overlap)
    with evaluation(enlarger.device.type), cached(enlarger.network):
        enlarger.begin((whole.shape[2], whole.shape[3]))
        for tile in parts:
            try:
                images = enlarger.tile(tile.of(whole[0]), tile)
            except torch.OutOfMemoryError as error:
                height, width = tile.times(scale).size
                smaller = max(height, width) // 2
                raise ConfigError(
                    f"a tile of {width}x{height} pixels takes more memory than the GPU has: give "
                    f"tile={smaller} overlap={min(overlap, smaller // 2)}"
                ) from error
            blend.add(tile.times(scale), images)
            if bar is not None:
                bar.update()
    enlarged = blend.image()[..., : scale * size[0], : scale * size[1]]
    return Enlarged(enlarged, len(parts), blend.mean_difference())
