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

    PARTS = ("order",)

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order)

    @staticmethod
    def product(order: Tensor) -> tuple[Tensor, Tensor]:
        """Its matrix, (..., C, C) float64, and ln|det| = 0."""
        return F.one_hot(order, order.shape[-1]).double(), order.new_zeros(
            order.shape[:-1], dtype=torch.float64
        )

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

    PARTS: tuple[str, ...] = ("weight",)  # what `product` takes

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(rotation(channels).float())

    @staticmethod
    def product(weight: Tensor) -> tuple[Tensor, Tensor]:
        """W (..., C, C) and ln|det W|, (...), both float64."""
        weight = weight.double()
        return weight, torch.linalg.slogdet(weight).logabsdet

    def forward(self, x: Tensor, context=None) -> tuple[Tensor, Tensor]:
        weight, log_det = matrices([self])
        return multiply(weight[0].to(x.dtype), x), volume(log_det, x)

    def inverse(self, z: Tensor, context=None) -> tuple[Tensor, Tensor]:
        weight, log_det = matrices([self])
        return multiply(torch.linalg.inv(weight)[0].to(z.dtype), z), volume(-log_det, z)


class InvertibleConv1x1LU(InvertibleConv1x1):
    """The same map with W = P (L + I) (U + diag(d)), section 3.2, equations 10 and 11; d = sign e^s is the code's.

        log_det = H W sum(s)

    P and the signs stay as they are drawn; L is strictly lower and U strictly upper triangular. Cannot become
    singular as long as s is finite, which W itself can ("input is not invertible" of public Glows).
    """

    PARTS = ("permutation", "lower", "upper", "sign", "log_scale")

    def __init__(self, channels: int) -> None:
        Flow.__init__(self)
        permutation, lower, upper = torch.linalg.lu(rotation(channels))
        diagonal = upper.diagonal()
        self.register_buffer("permutation", permutation.float())
        self.register_buffer("sign", diagonal.sign().float())
        self.lower = nn.Parameter(lower.tril(-1).float())
        self.upper = nn.Parameter(upper.triu(1).float())
        self.log_scale = nn.Parameter(diagonal.abs().log().float())

    @staticmethod
    def product(permutation, lower, upper, sign, log_scale) -> tuple[Tensor, Tensor]:
        permutation, lower, upper, sign, log_scale = (
            part.double() for part in (permutation, lower, upper, sign, log_scale)
        )  # which autocast leaves alone
        lower = lower.tril(-1) + torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        upper = upper.triu(1) + torch.diag_embed(sign * log_scale.exp())
        return permutation @ lower @ upper, log_scale.sum(-1)


def matrices(layers: list[ChannelPermutation | InvertibleConv1x1]) -> tuple[Tensor, Tensor]:
    """W of n layers of one kind, (n, C, C), and their ln|det W|, (n,); float64. All in a few batched operations."""
    kind = type(layers[0])
    return kind.product(
        *(torch.stack([getattr(layer, part) for layer in layers]) for part in kind.PARTS)
    )


def multiply(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b at every pixel, as one matrix product over the pixels of channels_last images; never autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


def volume(log_det: Tensor, x: Tensor) -> Tensor:
    """The log-determinant of a map that has `log_det`, one number, at every pixel of x: (B,)."""
    return (x.shape[2] * x.shape[3] * log_det).to(no_log_det(x).dtype).expand(len(x))


def rotation(channels: int) -> Tensor:
    """A random orthogonal matrix (C, C), float64 (QR of a Gaussian one, as in the authors' code)."""
    return nn.init.orthogonal_(torch.empty(channels, channels, dtype=torch.float64))
