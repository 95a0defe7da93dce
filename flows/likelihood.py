"""From nats to the unit of the papers' tables."""

import math

from torch import Tensor


def bits_per_dim(log_prob: Tensor, n_dims: int, n_bits: int) -> Tensor:
    """Bits per dimension of images of `n_bits` bits, from a density of x in [0, 1]^D.

        bpd = (-log p(x) + D n_bits ln 2) / (D ln 2)

    The second term accounts for the volume of a bin: the density of x = (q + u) / 2^n_bits is
    2^(n_bits D) times that of q + u (Theis et al. 2016; RealNVP's code). A uniform density on
    [0, 1]^D therefore gives exactly n_bits:

    >>> import torch
    >>> bits_per_dim(torch.zeros(2), n_dims=3 * 32 * 32, n_bits=8)
    tensor([8., 8.])

    log_prob: nats, (B,). n_dims: D = C*H*W. Returns bits per dimension, (B,).
    """
    return n_bits - log_prob / (n_dims * math.log(2))
