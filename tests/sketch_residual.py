"""A sketch of a residual flow (Chen et al. 2019).

Its log-determinant is an estimate and its inverse an iteration. The noise of the estimate is an
argument, so that it is a function of seed, epoch and batch in training, and of the image in
evaluation. Evaluation needs autograd too.
"""

import torch
from torch import Tensor, nn

from flows.base import Flow, FlowModel
from flows.context import Context


class ResidualLayer(Flow):
    """y = x + g(x) with |dg/dx| < 1.

        ln|det(1 + dg/dx)| = sum over k of (-1)^(k + 1) / k tr((dg/dx)^k)

    The traces are Hutchinson's estimate v^T (dg/dx)^k v with a probe v of signs (Skilling 1989),
    which the layer takes as its context, (B, D).

    n_terms: of the sum. n_iterations: of the inverse, x <- y - g(x).
    """

    def __init__(
        self, n_dims: int, hidden_channels: int, n_terms: int = 12, n_iterations: int = 60
    ) -> None:
        super().__init__()
        self.n_terms = n_terms
        self.n_iterations = n_iterations
        self.first = nn.Linear(n_dims, hidden_channels)
        self.last = nn.Linear(hidden_channels, n_dims)

    def g(self, x: Tensor) -> Tensor:
        """The residual, |dg/dx| < 1/2: each weight is divided by a bound of its spectral norm."""
        first, last = (
            0.7 * w / w.norm().clamp(min=0.7) for w in (self.first.weight, self.last.weight)
        )
        hidden = torch.tanh(nn.functional.linear(x, first, self.first.bias))
        return nn.functional.linear(hidden, last, self.last.bias).to(x.dtype)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        training = torch.is_grad_enabled()
        with torch.enable_grad():
            inner = x
            if not x.requires_grad:
                inner = x.detach().requires_grad_()
            residual = self.g(inner)
            vector = context
            log_det = torch.zeros_like(x[:, 0])
            for k in range(1, self.n_terms + 1):
                (vector,) = torch.autograd.grad(
                    residual, inner, vector, create_graph=training, retain_graph=True
                )
                log_det = log_det - (-1) ** k / k * (vector * context).sum(1)
        y = x + residual
        if training:
            return y, log_det
        return y.detach(), log_det.detach()

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = z
        for _ in range(self.n_iterations):
            x = z - self.g(x)
        return x, -self(x, context)[1]


class ResidualFlow(FlowModel):
    """Two residual layers for points, each with a probe of its own."""

    needs_autograd = True
    noise_shape: tuple[int, ...]

    def __init__(
        self, shape: tuple[int, ...] = (3,), hidden_channels: int = 8, n_iterations: int = 60
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.noise_shape = (2, *shape)
        self.layers = nn.ModuleList(
            ResidualLayer(shape[0], hidden_channels, n_iterations=n_iterations) for _ in range(2)
        )

    def latent_shapes(self, shape: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], ...]:
        return (self.shape,)

    def forward(
        self, x: Tensor, context: Context = None, noise: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        self.check_data(x)
        self.encoded(context, len(x))  # an error where there is one
        total = torch.zeros_like(x[:, 0])
        for layer, probe in zip(self.layers, self._probes(x, noise), strict=True):
            x, log_det = layer(x, probe)
            total = total + log_det
        return (x,), total

    def inverse(
        self, z: tuple[Tensor, ...], context: Context = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self.check_latents(z)
        self.encoded(context, len(z[0]))
        x = z[0]
        total = torch.zeros_like(x[:, 0])
        for layer, probe in reversed(list(zip(self.layers, self._probes(x, noise), strict=True))):
            x, log_det = layer.inverse(x, probe)
            total = total + log_det
        return x, total

    def _probes(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, ...]:
        """Signs, one probe for each layer, (B, D).

        Samples need no log-determinant, and give no noise: any probe will do.
        """
        if noise is None:
            noise = torch.zeros(len(x), *self.noise_shape)
        return tuple(torch.where(noise < 0.5, -1.0, 1.0).to(x).unbind(1))
