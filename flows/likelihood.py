"""From nats to the unit of the papers' tables."""

import math

from torch import Tensor


def bits_per_dim(log_prob: Tensor, n_dims: int, n_bits: int) -> Tensor:
    """bpd = (-log p(x) + D n_bits ln 2) / (D ln 2) for x in [0, 1]^D: the only place with log 2.

    The second term is the volume of a bin: x = (q + u) / 2^n_bits has a density 2^(n_bits D) times that of q + u
    (Theis et al. 2016; RealNVP's code). A uniform density on [0, 1]^D gives exactly n_bits.

    log_prob: nats, (B,). n_dims: D = C*H*W. Returns bits per dimension, (B,).
    """
    return n_bits - log_prob / (n_dims * math.log(2))
