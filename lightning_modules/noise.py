"""Noise that depends only on where it is used, not on what was drawn before."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

KINDS = ("uniform", "normal")  # uniform on [0, 1), standard normal
GENERATOR_METHODS = {"uniform": "random", "normal": "standard_normal"}  # of numpy

# Numbers of independent streams of random numbers.
DATA = 0
FLOW = 1
NETWORK = 2
SAMPLES = 3


class Dequantization(Protocol):
    """What an objective needs from a dequantiser, as `Dequantizer` in datamodules/ explains."""

    @property
    def noise(self) -> str: ...

    @property
    def kind(self) -> str: ...

    def __call__(
        self, q: Tensor, noise: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def initialize(self, q: Tensor, noise: Tensor, context: Tensor | None = None) -> None: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass(frozen=True)
class Position:
    """The place of a micro-batch in training.

    A global batch is divided into `parts` slices of equal size: one for each micro-batch of each
    rank.

    epoch: the number of the epoch. step: the number of the global batch in its epoch. part: the
    number of the slice, from 0 to parts - 1.
    """

    epoch: int
    step: int
    part: int = 0
    parts: int = 1


def part_noise(
    shape: tuple[int, ...],
    seed: int,
    position: Position,
    device: torch.device,
    kind: str = "uniform",
    stream: int = DATA,
) -> Tensor:
    """The slice of the global batch's noise for one micro-batch: float32, of `shape` (b, ...).

    The other arguments are those of `batch_noise`.

    >>> cpu = torch.device("cpu")
    >>> whole = batch_noise((4, 3), seed=0, epoch=2, batch=5, device=cpu)
    >>> half = part_noise((2, 3), 0, Position(epoch=2, step=5, part=1, parts=2), cpu)
    >>> torch.equal(half, whole[2:])
    True
    """
    n, *rest = shape
    global_shape = (position.parts * n, *rest)
    noise = batch_noise(global_shape, seed, position.epoch, position.step, device, kind, stream)
    return noise[position.part * n : (position.part + 1) * n]


def batch_noise(
    shape: tuple[int, ...],
    seed: int,
    epoch: int,
    batch: int,
    device: torch.device,
    kind: str = "uniform",
    stream: int = DATA,
) -> Tensor:
    """Noise for a whole global training batch, float32 of `shape`.

    It is a function of the seed, the epoch, `batch` (the number of the global batch in the epoch),
    and the kind of device on which it is drawn: a GPU's generator draws other numbers than a CPU's.

    kind: one of KINDS. stream: DATA, or another number for noise that is independent of it.
    """
    key = np.random.SeedSequence(_key(seed, epoch, batch, stream)).generate_state(1)[0]
    generator = torch.Generator(device).manual_seed(int(key))
    draw = {"uniform": torch.rand, "normal": torch.randn}[kind]
    return draw(shape, generator=generator, device=device, dtype=torch.float32)


def image_noise(
    indices: Tensor,
    shape: tuple[int, ...],
    seed: int,
    k: int = 0,
    kind: str = "uniform",
    stream: int = DATA,
) -> Tensor:
    """Noise for evaluation, float32 (B, *shape) on the CPU.

    An image's noise is a function of the noise seed, the image's index and k. So the bits/dim of an
    image depend neither on the batch size nor on the number of ranks.

    indices: (B,). k: the number of the noise sample, if there are several for each image. kind,
    stream: as in `batch_noise`.

    >>> noise = image_noise(torch.tensor([7, 8, 9]), (3, 8, 8), seed=0)
    >>> torch.equal(image_noise(torch.tensor([9]), (3, 8, 8), seed=0), noise[2:])
    True
    """
    draws = []
    for index in indices.tolist():
        generator = np.random.default_rng(_key(seed, index, k, stream))
        draw: Callable[..., np.ndarray] = getattr(generator, GENERATOR_METHODS[kind])
        draws.append(draw(tuple(shape), dtype=np.float32))
    return torch.from_numpy(np.stack(draws))


def evaluation_input(
    dequantizer: Dequantization,
    q: Tensor,
    indices: Tensor,
    seed: int,
    dtype: torch.dtype = torch.float32,
    k: int = 0,
    context: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x, (B, *shape), and log_weight, (B,), of integers q, (B, *shape), on the device of q.

    Each image is dequantised with its `image_noise`, which depends on its index, the seed and k.
    """
    noise = image_noise(indices, q.shape[1:], seed, k, dequantizer.noise)
    return dequantizer(q, noise.to(q.device, dtype), context)


def image_generator(index: int, seed: int) -> torch.Generator:
    """A generator of the latents that are drawn for one image in evaluation.

    Its numbers are a function of the noise seed and the image's index, and independent of the
    noise that `image_noise` adds to the image.
    """
    key = np.random.SeedSequence(_key(seed, index, 0, SAMPLES)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(key))


def network_seed(seed: int, position: Position) -> int:
    """A seed for torch's generator in a pass through networks that draw random numbers (dropout).

    It is a function of the run's seed and the place in training.
    """
    key = [*_key(seed, position.epoch, position.step, NETWORK), position.part]
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def _key(seed: int, first: int, second: int, stream: int) -> list[int]:
    """The key of a generator; without DATA, so that the noise of earlier runs stays the same."""
    key = [seed, first, second]
    if stream != DATA:
        key.append(stream)
    return key
