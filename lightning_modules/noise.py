"""Dequantisation noise u ~ U[0, 1) as a function of where it is used, not of what was drawn before."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def batch_noise(shape: tuple[int, ...], seed: int, epoch: int, batch: int, device: torch.device) -> Tensor:
    """Noise of a whole global training batch, float32 of `shape`, keyed (seed, epoch, number of the global batch).

    Drawn on the device, whose generator it depends on; ranks and micro-batches take contiguous slices.
    """
    key = np.random.SeedSequence([seed, epoch, batch]).generate_state(1)[0]
    generator = torch.Generator(device).manual_seed(int(key))
    return torch.rand(shape, generator=generator, device=device, dtype=torch.float32)


def image_noise(indices: Tensor, shape: tuple[int, ...], seed: int, k: int = 0) -> Tensor:
    """Noise for evaluation, float32 (B, *shape) on the CPU, keyed (noise seed, image index, k).

    So a bpd depends neither on the batch size nor on the number of ranks.
    """
    draws = [np.random.default_rng([seed, index, k]).random(shape, dtype=np.float32) for index in indices.tolist()]
    return torch.from_numpy(np.stack(draws))


def evaluation_input(
    dequantizer: Callable[[Tensor, Tensor], Tensor], q: Tensor, indices: Tensor, seed: int, dtype=torch.float32
) -> Tensor:
    """x of integers q (B, *shape), with each one's own `image_noise`, on their device."""
    return dequantizer(q, image_noise(indices, q.shape[1:], seed).to(q.device, dtype))
