"""A sketch of a learned dequantiser: that of Flow++ (Ho et al. 2019) in small.

It uses nothing private. A script hands it to the objective:
`DensityModule.of(config, flow, data, LogitNormal(data.n_bits))`. Its parameters are then trained,
clipped, averaged, saved and loaded with those of the flow, and the metric is called `bpd_bound`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.dequantization import Dequantizer, below_one


class LogitNormal(Dequantizer):
    """u = sigmoid(m + e^s eps), eps ~ N(0, 1); m and s are linear in the pixel, m in the class."""

    noise = "normal"
    kind = "bound"

    def __init__(self, n_bits: int, n_classes: int | None = None) -> None:
        super().__init__(n_bits)
        self.mean = nn.Parameter(torch.tensor([0.3, -0.5]))
        self.log_std = nn.Parameter(torch.tensor([0.5, 0.2]))
        self.by_class = None
        if n_classes is not None:
            self.by_class = nn.Parameter(torch.linspace(0, 1, n_classes))

    def forward(
        self, q: Tensor, noise: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        level = q.to(noise.dtype) / 2**self.n_bits
        mean = self.mean[0] + self.mean[1] * level
        if self.by_class is not None:
            mean = mean + self.by_class[context].view(-1, *[1] * (q.dim() - 1))
        log_std = self.log_std[0] + self.log_std[1] * level
        logits = mean + log_std.exp() * noise
        base = -0.5 * (noise.square() + math.log(2 * math.pi))
        log_slope = log_std + F.logsigmoid(logits) + F.logsigmoid(-logits)  # of u as a map of eps
        x = below_one((q.to(noise.dtype) + logits.sigmoid()) / 2**self.n_bits)
        return x, (log_slope - base).flatten(1).sum(1)
