"""A sketch of an objective without a flow, whose metric is better when it is higher.

It uses nothing private. A new objective needs such a file, a recipe and a script (CONTRIBUTING.md).
DDPM and super-resolution without a flow would be objectives of this kind.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.metrics import image_mean
from lightning_modules.noise import image_noise
from lightning_modules.optimization import OptimizedModule
from results.metrics import Metric

SIGMA = 0.2


class Denoiser(OptimizedModule):
    """A network that takes the noise off images: x + sigma eps to x.

    It minimises the squared error and reports the PSNR in dB. Its mean colour is set from data. It
    draws no samples; its pictures are noisy images and what it makes of them.
    """

    metrics = (Metric("psnr", "higher", "dB"),)

    def __init__(self, net: nn.Module, shape: tuple[int, ...], **arguments) -> None:
        super().__init__(**arguments)
        self.net = net
        self.shape = tuple(shape)
        self.n_bits = 8
        self.register_buffer("colour", torch.full((3, 1, 1), torch.nan))
        self.eval_mean = image_mean()

    @classmethod
    def of(cls, config, model, data):
        return cls(
            model, data.shape, seed=config.seed, noise_seed=config.eval.noise_seed, **config.optim
        )

    @property
    def trained(self):
        return self.net

    def needs_initialization(self):
        return bool(self.colour.isnan().any())

    def initialize(self, batch):
        self.colour.copy_((batch[0] / 255).mean((0, 2, 3))[:, None, None])

    def noisy(self, batch) -> tuple[Tensor, Tensor]:
        """Images of evaluation, and the same with noise."""
        clean = batch[0] / 255
        eps = image_noise(batch[1], self.shape, self.noise_seed, kind="normal").to(clean)
        return clean, clean + SIGMA * eps

    def denoised(self, x: Tensor) -> Tensor:
        return self.colour + self.net(x - self.colour)

    def training_step(self, batch, batch_idx):
        clean = batch[0] / 255
        eps = self.training_noise(clean.shape, self.position(batch_idx), "normal")
        error = (self.denoised(clean + SIGMA * eps) - clean).square().flatten(1).mean(1)
        decibels = psnr(error.detach())
        self.train_mean.update(decibels)
        self.log("train/psnr", decibels.mean())
        return self.finite_or_nan(error.mean())

    def validation_step(self, batch, batch_idx):
        self._evaluate(batch, "val")

    def test_step(self, batch, batch_idx):
        self._evaluate(batch, "test")

    def _evaluate(self, batch, split: str) -> None:
        clean, noisy = self.noisy(batch)
        error = F.mse_loss(self.denoised(noisy), clean, reduction="none").flatten(1).mean(1)
        self.eval_mean.update(psnr(error))
        self.log(f"{split}/psnr", self.eval_mean, on_step=False, on_epoch=True)

    def reconstruct(self, batch):
        _, noisy = self.noisy(batch)
        return noisy, self.denoised(noisy)


def psnr(mean_square: Tensor) -> Tensor:
    """The peak signal-to-noise ratio, dB, of images in [0, 1] with a mean squared error."""
    return -10 * mean_square.log10()
