"""A sketch of NICE (Dinh et al. 2014): an additive flow onto a logistic base.

It uses nothing private. A new flow needs such a file, and a case in cases.py, by which every
generic test runs over it (CONTRIBUTING.md).
"""

import torch
from torch import Tensor, nn

from flows.base import Compose, Flow, FlowModel
from flows.bases import StandardLogistic
from flows.context import Context
from flows.coupling import AdditiveCoupling
from flows.linear import ChannelPermutation
from flows.multiscale import of_level


class Shift(nn.Module):
    """The network t of an additive coupling, for vectors: (B, D/2) to (B, D/2)."""

    def __init__(self, n_dims: int, hidden_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(n_dims, hidden_channels), nn.ReLU(), nn.Linear(hidden_channels, n_dims)
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layers(x).to(x.dtype)


class DiagonalScaling(Flow):
    """y = x exp(s), one s for every dimension; log_det = sum(s) (section 3.3)."""

    def __init__(self, n_dims: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(n_dims))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp(), self.log_scale.sum().expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z * torch.exp(-self.log_scale), -self.log_scale.sum().expand(len(z))


class Nice(FlowModel):
    """Additive couplings and a diagonal scaling.

    The order of the dimensions is reversed after every coupling.
    """

    base = StandardLogistic()
    shape: tuple[int, ...]

    def __init__(
        self, shape: tuple[int, ...], n_couplings: int = 4, hidden_channels: int = 8
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        n_dims = torch.Size(shape).numel()
        layers: list[Flow] = []
        for _ in range(n_couplings):
            layers.append(AdditiveCoupling(Shift(n_dims // 2, hidden_channels)))
            layers.append(ChannelPermutation(torch.arange(n_dims).flip(0)))
        self.layers = Compose([*layers, DiagonalScaling(n_dims)])

    def latent_shapes(self, shape: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], ...]:
        return ((torch.Size(self.shape).numel(),),)

    def forward(self, x: Tensor, context: Context = None) -> tuple[tuple[Tensor, ...], Tensor]:
        self.check_data(x)
        z, log_det = self.layers(x.flatten(1), of_level(self.encoded(context, len(x)), 0))
        return (z,), log_det

    def inverse(self, z: tuple[Tensor, ...], context: Context = None) -> tuple[Tensor, Tensor]:
        self.check_latents(z)
        x, log_det = self.layers.inverse(z[0], of_level(self.encoded(context, len(z[0])), 0))
        return x.unflatten(1, self.shape), log_det
