"""Noise as a function of where it is used, not of what was drawn before."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

KINDS = ("uniform", "normal")  # on [0, 1), and standard normal
DATA, FLOW, NETWORK = 0, 1, 2  # streams: one moves no number of another


@dataclass(frozen=True)
class Position:
    """Where in training a micro-batch stands: a slice of a global batch, which ranks and micro-batches share.

    step: number of the global batch in its epoch. part: number of the slice among `parts` of equal size.
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
    """Noise of a micro-batch, float32 of `shape` = (b, ...): its contiguous slice of the global batch's noise."""
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
    """Noise of a whole global training batch, float32 of `shape`, keyed (seed, epoch, number of the global batch).

    Drawn on the device, whose generator it depends on. kind: one of KINDS. stream: DATA, or another number for noise
    that is independent of it.
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
    """Noise for evaluation, float32 (B, *shape) on the CPU, keyed (noise seed, image index, k).

    So a bpd depends neither on the batch size nor on the number of ranks. k: number of the noise sample of an image.
    """
    draws = []
    for index in indices.tolist():
        generator = np.random.default_rng(_key(seed, index, k, stream))
        draw = {"uniform": generator.random, "normal": generator.standard_normal}[kind]
        draws.append(draw(tuple(shape), dtype=np.float32))
    return torch.from_numpy(np.stack(draws))


def evaluation_input(
    dequantizer: nn.Module,
    q: Tensor,
    indices: Tensor,
    seed: int,
    dtype=torch.float32,
    k: int = 0,
    context=None,
) -> tuple[Tensor, Tensor]:
    """x and log_weight of integers q (B, *shape), with each one's own `image_noise`, on their device."""
    noise = image_noise(indices, q.shape[1:], seed, k, dequantizer.noise)
    return dequantizer(q, noise.to(q.device, dtype), context)


def network_seed(seed: int, at: Position) -> int:
    """For torch's generator in a pass through a network that draws (dropout): a function of seed and place."""
    return int(
        np.random.SeedSequence([*_key(seed, at.epoch, at.step, NETWORK), at.part]).generate_state(
            1
        )[0]
    )


def _key(seed: int, first: int, second: int, stream: int) -> list[int]:
    return [seed, first, second, *([stream] if stream else [])]
