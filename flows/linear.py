"""Linear maps of the channels of a pixel: the "permutations" of Glow's steps.

Kingma & Dhariwal 2018, section 3.2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.base import Flow, no_log_det


class ChannelPermutation(Flow):
    """y_c = x_order[c]; log_det is 0. The order is reversed (RealNVP, NICE) or a fixed shuffle.

    order: (C,) int64. It is a buffer saved with the weights, so a loaded flow has the same shuffle.
    (The authors of Glow seed theirs with Python's hash of a name, which differs between processes.)

    >>> y, log_det = ChannelPermutation(torch.tensor([2, 0, 1]))(torch.arange(3.0).view(1, 3, 1, 1))
    >>> y.flatten(), log_det
    (tensor([2., 0., 1.]), tensor([0.]))
    """

    PARTS: tuple[str, ...] = ("order",)  # the attributes that `product` takes

    order: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order)

    @staticmethod
    def product(*parts: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix, (..., C, C) float64, and ln|det| = 0."""
        (order,) = parts
        matrix = F.one_hot(order, order.shape[-1]).double()
        return matrix, order.new_zeros(order.shape[:-1], dtype=torch.float64)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x[:, self.order], no_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z[:, self.order.argsort()], no_log_det(z)


class InvertibleConv1x1(Flow):
    """y = W x at every pixel (Kingma & Dhariwal 2018, section 3.2, equation 9).

        log_det = H W ln|det W|

    W, (C, C), is the parameter, as by default in the authors' code, and is a random rotation at
    first. ln|det W| and W^-1 are computed in float64. The product W x is never autocast: rounded to
    bfloat16 it could not be inverted accurately.

    >>> conv = InvertibleConv1x1(channels=4)
    >>> x = torch.rand(2, 4, 6, 6)
    >>> y, log_det = conv(x)
    >>> log_det.shape, torch.allclose(log_det, torch.zeros(2), atol=1e-3)  # of a rotation: 0
    (torch.Size([2]), True)
    >>> torch.allclose(conv.inverse(y)[0], x, atol=1e-5)
    True
    """

    PARTS: tuple[str, ...] = ("weight",)  # the attributes that `product` takes

    weight: nn.Parameter

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(rotation(channels).float())

    @staticmethod
    def product(*parts: Tensor) -> tuple[Tensor, Tensor]:
        """W, (..., C, C), and ln|det W|, (...), both float64, from the parameters."""
        (weight,) = (part.double() for part in parts)
        return weight, torch.linalg.slogdet(weight).logabsdet

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weight, log_det = matrices([self])
        return multiply(weight[0].to(x.dtype), x), volume(log_det, x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weight, log_det = matrices([self])
        return multiply(torch.linalg.inv(weight)[0].to(z.dtype), z), volume(-log_det, z)


class InvertibleConv1x1LU(InvertibleConv1x1):
    """The same map with W = P (L + I) (U + diag(d)) (section 3.2, equations 10 and 11).

        d = sign e^s,    log_det = H W sum(s)    (H, W: height and width)

    L is strictly lower and U strictly upper triangular. P and the signs keep their initial values,
    as in the authors' code. This W cannot become singular as long as s is finite. A W that is
    itself the parameter can ("input is not invertible", a known error of public Glows).

    >>> sorted(name for name, _ in InvertibleConv1x1LU(4).named_parameters())
    ['log_scale', 'lower', 'upper']
    """

    PARTS = ("permutation", "lower", "upper", "sign", "log_scale")

    permutation: Tensor
    sign: Tensor

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
    def product(*parts: Tensor) -> tuple[Tensor, Tensor]:
        # Autocast leaves float64 products as they are.
        permutation, lower, upper, sign, log_scale = (part.double() for part in parts)
        lower = lower.tril(-1) + torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        upper = upper.triu(1) + torch.diag_embed(sign * log_scale.exp())
        return permutation @ lower @ upper, log_scale.sum(-1)


def matrices(
    layers: Sequence[ChannelPermutation | InvertibleConv1x1],
) -> tuple[Tensor, Tensor]:
    """W of n layers of the same class, (n, C, C), and their ln|det W|, (n,); float64.

    All of them are computed together, in a few batched operations.
    """
    kind = type(layers[0])
    parts = (torch.stack([getattr(layer, part) for layer in layers]) for part in kind.PARTS)
    return kind.product(*parts)


def multiply(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b at every pixel, never autocast. weight: W, (C, C). bias: b, (C,).

    For channels_last images this is a single matrix product over all pixels.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


def volume(log_det: Tensor, x: Tensor) -> Tensor:
    """The log-determinant, (B,), of a map whose log-determinant at each pixel of x is `log_det`."""
    return (x.shape[2] * x.shape[3] * log_det).to(no_log_det(x).dtype).expand(len(x))


def rotation(channels: int) -> Tensor:
    """A random orthogonal matrix (C, C), float64: QR of a Gaussian one, as in the authors' code."""
    return nn.init.orthogonal_(torch.empty(channels, channels, dtype=torch.float64))
