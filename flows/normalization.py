"""Normalisation by the batch (RealNVP) and by a first batch (Glow), inside conditioners and as flows."""

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flows.base import Flow
from flows.constants import FixedBuffers
from flows.masks import as_mask


def n_ranks() -> int:
    """Processes that train together: 1 outside of torch.distributed."""
    return (
        distributed.get_world_size()
        if distributed.is_available() and distributed.is_initialized()
        else 1
    )


@torch.compiler.disable
def over_ranks(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of the elements of all ranks, from each rank's own; differentiable.

    Every rank has to hold equally many elements and to call it. var is the mean of the variances plus the variance of
    the means (Chan et al. 1983), which cancels nothing. torch's SyncBatchNorm refuses CPU tensors.
    """
    gathered = mean.new_zeros(n_ranks(), 2, len(mean))
    gathered[distributed.get_rank()] = torch.stack([mean, var])
    means, variances = SumOverRanks.apply(gathered).unbind(1)  # a gather: the others' rows are 0
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)


class SumOverRanks(torch.autograd.Function):
    """Every rank gets the sum; the gradient of a rank's term is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(
            memory_format=torch.contiguous_format
        )  # what a reduction needs, whatever a gradient's strides
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return SumOverRanks.apply(grad)


class BiasOnlyBatchNorm2d(FixedBuffers, nn.BatchNorm2d):
    """y = (x - mu) / sqrt(var + 1e-4) + beta: RealNVP's conditioners have no gamma (authors' code, `scale=False`).

    Running averages are new = .9 old + .1 batch, as in that code; torch's running variance is the unbiased one, a
    factor 1 + 1/(B H W) above the code's. In training on several ranks mu, var and B are those of the global batch.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-4, momentum=0.1)
        del (
            self.weight
        )  # ones that are not learned: without any, CUDA kernels have no gradient for the bias
        self.register_buffer("weight", torch.ones(channels), persistent=False)

    def fixed_values(self) -> dict[str, Tensor]:
        return {"weight": torch.ones(self.num_features)}

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or n_ranks() == 1:
            return super().forward(x)
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(exact, dim=(0, 2, 3), correction=0)
        mean, var = over_ranks(mean, var)
        n = x.numel() // x.shape[1] * n_ranks()
        update_running(self, mean, var * (n / (n - 1)))
        mean, var = mean[:, None, None], var[:, None, None]
        return ((exact - mean) * torch.rsqrt(var + self.eps) + self.bias[:, None, None]).to(x.dtype)


class CouplingBatchNorm(Flow, _BatchNorm):
    """Batch normalisation as a bijection (Dinh et al. 2017, section 3.7 and appendix E; authors' code `bn_out`).

        y = (x - mu) exp(-1/2 ln(var + 1e-4)),    log_det = -1/2 sum ln(var + 1e-4) over the changed elements

    In training mu and var are the batch's (on several ranks the global one's), and gradients go through them; in eval,
    and in `inverse` always, they are running averages (new = .9 old + .1 batch). The paper's appendix E normalises
    with the running averages in training too; the code has that as `bn_lag`, whose default 0 is off, so the batch's
    moments win here.

    mask: 1 on the elements that the coupling changed, 0 on those that it kept, broadcast over (B, C, H, W): a tensor,
    or a module that gives the mask for x; None where all are changed. The kept elements pass unchanged, but count as
    zeros in the moments, as in the code.
    """

    def __init__(self, channels: int, mask: Tensor | nn.Module | None = None) -> None:
        super().__init__(channels, eps=1e-4, momentum=0.1, affine=False)
        self.mask = None if mask is None else as_mask(mask)

    def forward(self, x: Tensor, context=None) -> tuple[Tensor, Tensor]:
        if self.training:
            mean, var = self._batch_moments(x)
        else:
            mean, var = self.running_mean, self.running_var
        mean, log_std = self._on_changed(mean, var, x)
        return (x - mean) * torch.exp(-log_std), -self._volume(log_std, x)

    def inverse(self, z: Tensor, context=None) -> tuple[Tensor, Tensor]:
        mean, log_std = self._on_changed(self.running_mean, self.running_var, z)
        return z * torch.exp(log_std) + mean, self._volume(log_std, z)

    def _batch_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x if self.mask is None else x * self.mask(x)
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        if n_ranks() > 1:
            mean, var = over_ranks(mean, var)
        update_running(self, mean, var)
        return mean, var

    def _on_changed(self, mean: Tensor, var: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = mean[:, None, None], 0.5 * torch.log(var + self.eps)[:, None, None]
        if self.mask is None:
            return mean, log_std
        mask = self.mask(x)
        return mean * mask, log_std * mask

    def _volume(self, log_std: Tensor, x: Tensor) -> Tensor:
        return log_std.expand(1, *x.shape[1:]).sum().expand(x.shape[0])


@torch.no_grad()
def update_running(norm: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    """Move the running averages of `norm` towards a batch's moments, (C,) each."""
    norm.num_batches_tracked += 1
    # momentum None is torch's own convention for a cumulative average (torch.optim.swa_utils.update_bn)
    rate = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean), rate)
    norm.running_var.lerp_(var.to(norm.running_var), rate)


def scales_and_biases(log_scales: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, Tensor]:
    """exp(3 s) and b exp(3 s) of n layers that give (x + b) exp(3 s), (n, C) each, to be folded into linear maps."""
    scales = torch.exp(ActNorm.LOG_SCALE_FACTOR * torch.stack(log_scales).flatten(1))
    return scales, torch.stack(biases).flatten(1) * scales


class ActNorm(Flow):
    """y = (x + b) exp(3 s) per channel, both learned (Kingma & Dhariwal 2018, section 3.1).

        log_det = H W sum(3 s)

    `initialize` sets b = -mean and 3 s = -ln(std + 1e-6) of the channel over a first batch, so that y has mean 0 and
    variance 1 there; until then it is the identity. What is initialised stays as it is: `initialized` is a buffer
    and travels with the weights, so that a loaded flow is never set anew. The factor 3 multiplies the step size of s
    (authors' code, `logscale_factor`).
    """

    LOG_SCALE_FACTOR = 3.0

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor, context=None) -> tuple[Tensor, Tensor]:
        return self.normalize(x), self._log_det(x)

    def inverse(self, z: Tensor, context=None) -> tuple[Tensor, Tensor]:
        return z * torch.exp(-self.LOG_SCALE_FACTOR * self.log_scale) - self.bias, -self._log_det(z)

    def normalize(self, x: Tensor) -> Tensor:
        """y alone: inside a conditioner nobody asks for the log-determinant."""
        return (x + self.bias) * torch.exp(self.LOG_SCALE_FACTOR * self.log_scale)

    def initialize(self, x: Tensor, context=None) -> Tensor:
        if not self.initialized:
            var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            self.bias.copy_(-mean[:, None, None])
            self.log_scale.copy_(
                -torch.log(var.sqrt() + 1e-6)[:, None, None] / self.LOG_SCALE_FACTOR
            )
            self.initialized.fill_(True)
        return self.normalize(x)

    def _log_det(self, x: Tensor) -> Tensor:
        return (x.shape[2] * x.shape[3] * self.LOG_SCALE_FACTOR * self.log_scale.sum()).expand(
            len(x)
        )


def uninitialized(flow: nn.Module) -> bool:
    """Whether the flow holds an `ActNorm` that `initialize` has not set: then it is not ready to be trained."""
    return any(isinstance(m, ActNorm) and not m.initialized for m in flow.modules())
