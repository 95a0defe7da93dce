"""Base distributions: the distributions of a flow's latents."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F


class Base(ABC):
    """A distribution of latents whose dimensions are independent and identically distributed."""

    @abstractmethod
    def log_prob_of_level(self, z: Tensor) -> Tensor:
        """ln p of the latents of one level, (B, *shape): nats, (B,)."""

    @abstractmethod
    def draw(
        self, shape: tuple[int, ...], generator: torch.Generator | None, like: Tensor
    ) -> Tensor:
        """A sample of `shape`, with the dtype and the device of `like`."""

    def log_prob(self, latents: tuple[Tensor, ...]) -> Tensor:
        """ln p of the latents: nats, (B,), summed over all levels and dimensions.

        latents: a tuple with one tensor (B, *shape) for each level.
        """
        total = self.log_prob_of_level(latents[0])
        for z in latents[1:]:
            total = total + self.log_prob_of_level(z)
        return total

    def sample(
        self,
        n: int,
        shapes: tuple[tuple[int, ...], ...],
        temperature: float,
        generator: torch.Generator | None,
        like: Tensor,
    ) -> tuple[Tensor, ...]:
        """tau * eps for each shape, (n, *shape), with the dtype and the device of `like`.

        The numbers are drawn on the generator's device, so that the samples of a seed do not depend
        on the device of the flow.
        """
        if generator is None:
            return tuple(temperature * self.draw((n, *shape), None, like) for shape in shapes)
        on_generator = torch.empty(0, dtype=like.dtype, device=generator.device)
        return tuple(
            temperature * self.draw((n, *shape), generator, on_generator).to(like.device)
            for shape in shapes
        )


class StandardNormal(Base):
    """z ~ N(0, 1): ln p(z) = -1/2 (z^2 + ln 2 pi).

    >>> StandardNormal().log_prob((torch.zeros(1, 2),))  # -ln 2 pi
    tensor([-1.8379])
    """

    def log_prob_of_level(self, z: Tensor) -> Tensor:
        # The factor multiplies the sum from outside of flatten: inside, it would make the gradient
        # of channels_last latents contiguous.
        return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)

    def draw(
        self, shape: tuple[int, ...], generator: torch.Generator | None, like: Tensor
    ) -> Tensor:
        return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)


class StandardLogistic(Base):
    """z ~ logistic(0, 1), the base of NICE (Dinh et al. 2014, section 3.4).

        ln p(z) = -softplus(z) - softplus(-z)

    >>> StandardLogistic().log_prob((torch.zeros(1, 2),))  # -4 ln 2
    tensor([-2.7726])
    """

    def log_prob_of_level(self, z: Tensor) -> Tensor:
        return (-F.softplus(z) - F.softplus(-z)).flatten(1).sum(1)

    def draw(
        self, shape: tuple[int, ...], generator: torch.Generator | None, like: Tensor
    ) -> Tensor:
        uniform = torch.rand(shape, generator=generator, device=like.device, dtype=like.dtype)
        # torch.rand may return 0, whose logit is -inf.
        smallest = torch.finfo(like.dtype).eps / 4
        return uniform.clamp(min=smallest).logit()
