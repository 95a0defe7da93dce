"""Batch normalisation (RealNVP) and actnorm (Glow), in networks and as flows."""

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm

from flows.base import Flow
from flows.constants import FixedBuffers
from flows.masks import Mask, as_mask


def n_ranks() -> int:
    """The number of processes that train together; 1 without torch.distributed."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


@torch.compiler.disable
def over_ranks(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (C,), over the elements of all ranks; differentiable.

    The variance is the mean of the ranks' variances plus the variance of their means (Chan et al.
    1983), which subtracts no large numbers from each other. torch's SyncBatchNorm would do the
    same, but refuses CPU tensors.

    mean, var: (C,), the moments of this rank's elements. All ranks have to call this function, with
    equal numbers of elements.
    """
    moments = mean.new_zeros(n_ranks(), 2, len(mean))
    moments[distributed.get_rank()] = torch.stack([mean, var])
    # Each rank fills its own row and leaves the others 0, so the sum over ranks has all rows.
    means, variances = SumOverRanks.apply(moments).unbind(1)
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over ranks; its gradient is the sum of the gradients of all ranks."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        # all_reduce takes only contiguous tensors, and gradients may have any strides.
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Tensor:
        (grad,) = grads
        return SumOverRanks.apply(grad)


class BiasOnlyBatchNorm2d(FixedBuffers, nn.BatchNorm2d):
    """y = (x - mu) / sqrt(var + 1e-4) + beta: RealNVP's networks have no gamma.

    Authors' code, `scale=False`. Running averages are new = .9 old + .1 batch, as in the code, but
    torch averages the unbiased variance, which is larger by a factor N / (N - 1), N = B H W. In
    training on several ranks mu, var and B are those of the global batch.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-4, momentum=0.1)
        # A fixed weight of ones: without any weight, CUDA kernels give no gradient for the bias.
        del self.weight
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
        centred = exact - mean[:, None, None]
        inverse_std = torch.rsqrt(var[:, None, None] + self.eps)
        return (centred * inverse_std + self.bias[:, None, None]).to(x.dtype)


class CouplingBatchNorm(Flow, _BatchNorm):
    """Batch normalisation as a bijection (Dinh et al. 2017, section 3.7 and appendix E).

        y = (x - mu) exp(-1/2 ln(var + 1e-4)),
        log_det = -1/2 sum ln(var + 1e-4) over the changed elements

    In training mu and var are the moments of the batch (on several ranks, of the global batch), and
    gradients pass through them. In eval mode, and always in `inverse`, they are the running
    averages, new = .9 old + .1 batch. The paper's appendix E normalises with running averages in
    training too. In the authors' code (`bn_out`) that is an option, `bn_lag`, which is off by
    default (0); this class follows the code.

    mask: 1 on the elements that the coupling changed, 0 on those that it kept, broadcast over
    (B, C, H, W): a tensor, or a module that returns the mask for x. None: all were changed. The
    kept elements pass unchanged, but count as zeros in the moments, as in the code.

    >>> norm = CouplingBatchNorm(channels=3).eval()  # its running averages are 0 and 1 at first
    >>> y, log_det = norm(torch.zeros(2, 3, 4, 4))
    >>> log_det  # -1/2 * 48 ln(1.0001)
    tensor([-0.0024, -0.0024])
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    mask: nn.Module | None

    def __init__(self, channels: int, mask: Mask | None = None) -> None:
        super().__init__(channels, eps=1e-4, momentum=0.1, affine=False)
        self.mask = None if mask is None else as_mask(mask)

    # Unlike torch's batch norms, `forward` also returns the log-determinant. The class is a
    # _BatchNorm for its buffers, and for code that treats all batch norms alike.
    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        mean = self.running_mean
        var = self.running_var
        if self.training:
            mean, var = self._batch_moments(x)
        mean, log_std = self._on_changed(mean, var, x)
        return (x - mean) * torch.exp(-log_std), -self._volume(log_std, x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, log_std = self._on_changed(self.running_mean, self.running_var, z)
        return z * torch.exp(log_std) + mean, self._volume(log_std, z)

    def _batch_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, (C,) each, of the global batch; also updates the running averages.

        Raises ValueError: the batch is empty, and has no moments.
        """
        if not len(x):
            raise ValueError("an empty batch has no mean: a batch norm cannot be trained with it")
        if self.mask is not None:
            x = x * self.mask(x)
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        if n_ranks() > 1:
            mean, var = over_ranks(mean, var)
        update_running(self, mean, var)
        return mean, var

    def _on_changed(self, mean: Tensor, var: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and ln(std), which broadcast to x and are 0 on the kept elements."""
        mean = mean[:, None, None]
        log_std = 0.5 * torch.log(var + self.eps)[:, None, None]
        if self.mask is None:
            return mean, log_std
        mask = self.mask(x)
        return mean * mask, log_std * mask

    def _volume(self, log_std: Tensor, x: Tensor) -> Tensor:
        """The sum of ln(std) over all elements, (B,)."""
        return log_std.expand(1, *x.shape[1:]).sum().expand(x.shape[0])


@torch.no_grad()
def update_running(
    norm: BiasOnlyBatchNorm2d | CouplingBatchNorm, mean: Tensor, var: Tensor
) -> None:
    """Move the running averages of `norm` towards the moments of a batch, (C,) each.

    A momentum of None means a plain mean of all batches so far, as in torch's own batch norms.
    """
    norm.num_batches_tracked += 1
    rate: Tensor | float | None = norm.momentum
    if rate is None:
        rate = 1 / norm.num_batches_tracked
    norm.running_mean.lerp_(mean.to(norm.running_mean), rate)
    norm.running_var.lerp_(var.to(norm.running_var), rate)


def scales_and_biases(
    log_scales: list[Tensor], biases: list[Tensor], factor: float = 3.0
) -> tuple[Tensor, Tensor]:
    """exp(a s) and b exp(a s) of n layers (x + b) exp(a s), to be folded into linear maps.

    log_scales, biases: the s and the b of the layers, C elements each. factor: a, that of `ActNorm`
    and of Glow's zero-initialised layers. Returns two tensors (n, C).
    """
    scales = torch.exp(factor * torch.stack(log_scales).flatten(1))
    return scales, torch.stack(biases).flatten(1) * scales


class ActNorm(Flow):
    """y = (x + b) exp(a s) per channel, b and s learned (Kingma & Dhariwal 2018, section 3.1).

        log_det = H W sum(a s)

    It is the identity until `initialize` sets b = -mean and a s = -ln(std + 1e-6), from the mean
    and the standard deviation of each channel in a first batch; y then has mean 0 and variance 1 on
    that batch. This happens once: the buffer `initialized` is saved with the weights, so a loaded
    flow is not initialised again.

    log_scale_factor: a. The 3 of Glow's authors makes steps in the log-scale a s larger (their
        code, `logscale_factor`); SRFlow has 1.

    >>> norm = ActNorm(channels=3)
    >>> y = norm.initialize(5 + 2 * torch.randn(64, 3, 8, 8))
    >>> torch.allclose(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    True
    >>> torch.allclose(y.std((0, 2, 3)), torch.ones(3), atol=1e-3)
    True
    """

    # `initialize` needs this many values of each channel. With fewer, some of the many standard
    # deviations of a deep flow come out far too small, and other data get absurd likelihoods.
    FEWEST_VALUES = 32

    initialized: Tensor

    def __init__(self, channels: int, log_scale_factor: float = 3.0) -> None:
        super().__init__()
        self.log_scale_factor = log_scale_factor
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self.awaits_data = True
        self.register_load_state_dict_post_hook(_note_initialized)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.normalize(x), self._log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z * torch.exp(-self.log_scale_factor * self.log_scale) - self.bias, -self._log_det(z)

    def normalize(self, x: Tensor) -> Tensor:
        """y without the log-determinant, for actnorms inside of networks."""
        return (x + self.bias) * torch.exp(self.log_scale_factor * self.log_scale)

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if not self.initialized:
            mean, std = self._moments(x)
            self.bias.copy_(-mean[:, None, None])
            self.log_scale.copy_(-torch.log(std + 1e-6)[:, None, None] / self.log_scale_factor)
            self.initialized.fill_(True)
            self.awaits_data = False
        return self.normalize(x)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of a first batch, (C,).

        Raises ValueError: the batch has too few values, one that is not finite, or only one value.
        """
        n, channels, height, width = x.shape
        if n * height * width < self.FEWEST_VALUES:
            raise ValueError(
                f"the first batch, {n} data of {height}x{width} pixels at an ActNorm, is too small "
                f"to set it: give {self.FEWEST_VALUES} data or more, or a model with fewer levels"
            )
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        std = var.sqrt()
        wrong = int((~std.isfinite()).sum())
        if wrong:
            raise ValueError(
                f"{wrong} of {channels} channels are not finite in the first batch: "
                "give data without NaN or infinite values"
            )
        wrong = int((std <= 1e-6 * mean.abs().clamp(min=1)).sum())
        if wrong:
            raise ValueError(
                f"{wrong} of {channels} channels have the same value in all of the first batch: "
                "give data that differ, add noise to them (dequantisation), or leave a constant "
                "channel out"
            )
        return mean, std

    def _log_det(self, x: Tensor) -> Tensor:
        n_pixels = x.shape[2] * x.shape[3]
        return (n_pixels * self.log_scale_factor * self.log_scale.sum()).expand(len(x))


def _note_initialized(norm: ActNorm, keys: object) -> None:
    """After weights were loaded: keep where Python can read it whether they are initialised."""
    if not norm.initialized.is_meta:
        norm.awaits_data = not norm.initialized


def uninitialized(flow: nn.Module) -> bool:
    """Whether the flow holds an `ActNorm` that `initialize` has not set yet.

    Such a flow is not ready to be trained.

    >>> uninitialized(ActNorm(channels=3))
    True
    """
    return any(isinstance(m, ActNorm) and not m.initialized for m in flow.modules())
