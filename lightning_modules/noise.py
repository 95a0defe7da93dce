"""Noise as a function of the place where it is used, not of what was drawn before."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

KINDS = ("uniform", "normal")  # on [0, 1), and standard normal
GENERATOR_METHODS = {"uniform": "random", "normal": "standard_normal"}  # of numpy

# Streams of random numbers: noise of one stream does not depend on that of another.
DATA = 0
FLOW = 1
NETWORK = 2


class Dequantization(Protocol):
    """What an objective asks of a dequantiser: `Dequantizer` in datamodules/ describes it."""

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
    """The place of a micro-batch in training: a slice of a global batch.

    Ranks and micro-batches share a global batch: each takes a slice.

    epoch: number of the epoch. step: number of the global batch in its epoch. part: number of the
    slice among `parts` slices of equal size.
    """

    epoch: int
    step: int
    part: int = 0
    parts: int = 1


def part_noise(
    shape: tuple[int, ...],
    seed: int,
    at: Position,
    device: torch.device,
    kind: str = "uniform",
    stream: int = DATA,
) -> Tensor:
    """Noise of a micro-batch, float32 of `shape` = (b, ...): its slice of the global batch's noise.

    The other arguments are those of `batch_noise`.

    >>> cpu = torch.device("cpu")
    >>> whole = batch_noise((4, 3), seed=0, epoch=2, batch=5, device=cpu)
    >>> half = part_noise((2, 3), 0, Position(epoch=2, step=5, part=1, parts=2), cpu)
    >>> torch.equal(half, whole[2:])
    True
    """
    n, *rest = shape
    whole = batch_noise((at.parts * n, *rest), seed, at.epoch, at.step, device, kind, stream)
    return whole[at.part * n : (at.part + 1) * n]


def batch_noise(
    shape: tuple[int, ...],
    seed: int,
    epoch: int,
    batch: int,
    device: torch.device,
    kind: str = "uniform",
    stream: int = DATA,
) -> Tensor:
    """Noise of a whole global training batch, float32 of `shape`.

    It is a function of seed, epoch and `batch`, the number of the global batch in the epoch, and of
    the kind of device: it is drawn there, and a GPU's generator gives other numbers than a CPU's.

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

    indices: (B,). k: number of the noise sample of an image. kind, stream: as in `batch_noise`.

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
    """x (B, *shape) and log_weight (B,) of integers q (B, *shape), on their device.

    Each image has its own `image_noise`, whose arguments are indices, seed and k.
    """
    noise = image_noise(indices, q.shape[1:], seed, k, dequantizer.noise)
    return dequantizer(q, noise.to(q.device, dtype), context)


def network_seed(seed: int, at: Position) -> int:
    """A seed for torch's generator in a pass through a network that draws numbers (dropout).

    It is a function of the run's seed and the place in training.
    """
    key = [*_key(seed, at.epoch, at.step, NETWORK), at.part]
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def _key(seed: int, first: int, second: int, stream: int) -> list[int]:
    """The key of a generator. DATA is left out, as in the keys that earlier runs were made with."""
    key = [seed, first, second]
    if stream != DATA:
        key.append(stream)
    return key
