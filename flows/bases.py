"""Base distributions of the latents."""

import math

import torch
from torch import Tensor


class StandardNormal:
    """z ~ N(0, I) on every level: log p(z) = -1/2 sum(z^2 + ln 2 pi)."""

    def log_prob(self, latents: tuple[Tensor, ...]) -> Tensor:
        """Nats, (B,), summed over all levels and dimensions."""
        return sum(-0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1) for z in latents)

    def sample(
        self,
        n: int,
        shapes: tuple[tuple[int, ...], ...],
        temperature: float,
        generator: torch.Generator | None,
        like: Tensor,
    ) -> tuple[Tensor, ...]:
        """tau * eps for each shape, (n, *shape), with `like`'s dtype and device; drawn on the generator's device."""
        device = generator.device if generator is not None else like.device
        draw = (torch.randn(n, *s, generator=generator, device=device, dtype=like.dtype) for s in shapes)
        return tuple(temperature * eps.to(like.device) for eps in draw)
