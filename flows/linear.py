"""Linear maps over the channels of a pixel: the permutations of Glow's steps (Kingma & Dhariwal 2018, section 3.2)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.base import Flow, no_log_det


class ChannelPermutation(Flow):
    """y_c = x_order[c]; log_det is 0. `reverse` (as in RealNVP and NICE) and a fixed `shuffle` are of this kind.

    order: (C,) int64, a buffer that travels with the weights. The authors' code seeds the shuffle with Python's hash
    of a name, which differs from process to process.
    """

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order)

    def forward(self, x: Tensor, context=None) -> tuple[Tensor, Tensor]:
        return x[:, self.order], no_log_det(x)

    def inverse(self, z: Tensor, context=None) -> tuple[Tensor, Tensor]:
        return z[:, self.order.argsort()], no_log_det(z)


class InvertibleConv1x1(Flow):
    """y = W x at every pixel (section 3.2, equation 9); W (C, C) starts as a random rotation.

        log_det = H W ln|det W|

    The weight itself is the parameter, as in the authors' code by default. ln|det W| and W^-1 are taken in float64,
    and no product is autocast: bfloat16 would not invert.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(rotation(channels).float())

    def matrix(self) -> tuple[Tensor, Tensor]:
        """W (C, C) and ln|det W|, a scalar, both float64."""
        weight = self.weight.double()
        return weight, torch.linalg.slogdet(weight).logabsdet

    def forward(self, x: Tensor, context=None) -> tuple[Tensor, Tensor]:
        weight, log_det = self.matrix()
        return self._multiply(weight, x), self._volume(log_det, x)

    def inverse(self, z: Tensor, context=None) -> tuple[Tensor, Tensor]:
        weight, log_det = self.matrix()
        return self._multiply(torch.linalg.inv(weight), z), self._volume(-log_det, z)

    def _multiply(self, weight: Tensor, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.movedim(1, -1), weight.to(x.dtype)).movedim(-1, 1)

    def _volume(self, log_det: Tensor, x: Tensor) -> Tensor:
        return (x.shape[2] * x.shape[3] * log_det).to(no_log_det(x).dtype).expand(len(x))


class InvertibleConv1x1LU(InvertibleConv1x1):
    """The same map with W = P (L + I) (U + diag(d)), section 3.2, equations 10 and 11; d = sign e^s is the code's.

        log_det = H W sum(s)

    P and the signs stay as they are drawn; L is strictly lower and U strictly upper triangular. Cannot become
    singular as long as s is finite, which W itself can ("input is not invertible" of public Glows).
    """

    def __init__(self, channels: int) -> None:
        Flow.__init__(self)
        permutation, lower, upper = torch.linalg.lu(rotation(channels))
        diagonal = upper.diagonal()
        self.register_buffer("permutation", permutation.float())
        self.register_buffer("sign", diagonal.sign().float())
        self.lower = nn.Parameter(lower.tril(-1).float())
        self.upper = nn.Parameter(upper.triu(1).float())
        self.log_scale = nn.Parameter(diagonal.abs().log().float())

    def matrix(self) -> tuple[Tensor, Tensor]:
        log_scale = self.log_scale.double()
        lower = self.lower.double().tril(-1) + torch.eye(len(log_scale), dtype=torch.float64, device=log_scale.device)
        upper = self.upper.double().triu(1) + torch.diag(self.sign.double() * log_scale.exp())
        return self.permutation.double() @ lower @ upper, log_scale.sum()  # autocast leaves float64 alone


def rotation(channels: int) -> Tensor:
    """A random orthogonal matrix (C, C), float64 (QR of a Gaussian one, as in the authors' code)."""
    return nn.init.orthogonal_(torch.empty(channels, channels, dtype=torch.float64))
