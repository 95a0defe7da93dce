"""Super-resolution as a regression: a network's one image for each low-resolution one.

It trains RRDB, whose encoder SRFlow starts from (Lugmayr et al. 2020).
"""

from typing import Any, Self

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from lightning_modules.callbacks.image_quality import SuperResolved
from lightning_modules.checks import check_count
from lightning_modules.metrics import image_mean
from lightning_modules.objective import Data
from lightning_modules.optimization import OptimizedModule
from lightning_modules.precision import evaluation
from lightning_modules.super_resolution import LEVELS, N_BITS, check_scale, middle_of
from results.metrics import Metric


class RegressionModule(OptimizedModule):
    """Minimises the mean of |network(low_res / 255) - high_res / 255| over all values.

    Batches are (high_res uint8 (B, 3, H, W), index, low_res uint8 (B, 3, H/s, W/s)). The metric
    `l1` is the same in grey levels, as a mean over images, of what the network returns: neither
    rounded nor clipped. Validation and test also return the images for the callback `ImageQuality`.

    network: maps images in [0, 1], (B, 3, h, w), to (B, 3, s h, s w), where s is `scale`.
    shape: the shape of high_res, in which None is any size.
    n_bits: of a pixel, 8.
    l2, noise_samples, bn_images: keys that all recipes have, of likelihoods and batch norms, which
        there are none of here.
    The other arguments are those of `OptimizedModule`. Raises ValueError: one is out of its range.
    """

    metrics = (Metric("l1", "lower", "grey levels"),)
    has_temperature = False

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int | None, ...],
        n_bits: int | None,
        seed: int,
        scale: int = 4,
        l2: float = 0.0,
        noise_samples: int = 1,
        bn_images: int = 10_000,
        **arguments: Any,
    ) -> None:
        super().__init__(seed=seed, **arguments)
        if l2:
            raise ValueError(f"optim.l2={l2}: a regression has no L2 penalty: give 0")
        if noise_samples != 1:
            raise ValueError(
                f"eval.noise_samples={noise_samples}: a regression has no noise: give 1"
            )
        if n_bits != N_BITS:
            raise ValueError(f"super-resolution is of images of {N_BITS} bits, not of {n_bits}")
        check_count("eval.bn_images", bn_images)
        self.network = network
        self.shape = tuple(shape)
        self.n_bits = n_bits
        self.scale = scale
        self.eval_mean = image_mean()

    @classmethod
    def of(cls, config: DictConfig, model: nn.Module, data: Data) -> Self:
        settings = {**config.optim, **config.eval, "scale": config.flow.scale}
        return cls(model, data.shape, data.n_bits, config.seed, **settings)

    @property
    def trained(self) -> nn.Module:
        return self.network

    def check_data(self, data: Data) -> None:
        check_scale(data, self.scale)

    def constructors(self) -> dict[str, type]:
        return {**super().constructors(), "flow": type(self.network)}

    def errors(self, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The network's images, (B, 3, H, W), and their mean absolute errors, (B,), in [0, 1]."""
        high_res, _, low_res = batch
        images = self.network(low_res.to(self.float_dtype) / LEVELS)
        errors = (images.to(self.float_dtype) - high_res / LEVELS).abs()
        return images, errors.flatten(1).mean(1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        _, errors = self.errors(batch)
        levels = LEVELS * errors.detach()
        self.train_mean.update(levels)
        self.log(f"train/{self.metric.name}", levels.mean(), prog_bar=True)
        return self.finite_or_nan(errors.mean())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self._measure(batch, "val")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self._measure(batch, "test")

    def _measure(self, batch: list[Tensor], split: str) -> SuperResolved:
        with evaluation(self.device.type), torch.no_grad():
            images, errors = self.errors(batch)
        self.eval_mean.update(LEVELS * errors)
        name = f"{split}/{self.metric.name}"
        self.log(name, self.eval_mean, on_step=False, on_epoch=True, prog_bar=True)
        return SuperResolved(batch[2], batch[0], images[None])

    def super_resolved(self, batch: list[Tensor], n: int = 1) -> SuperResolved:
        """The images of a batch. n: 1, since the network makes one for each."""
        with evaluation(self.device.type), torch.no_grad():
            images, _ = self.errors(batch)
        return SuperResolved(batch[2], batch[0], images[None].expand(n, -1, -1, -1, -1))

    def reconstruct(self, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The middle of the true images and what the network makes of it, (B, 3, H, W) each."""
        part = middle_of(batch)
        images, _ = self.errors([tensor.to(self.device) for tensor in part])
        return part[0] / LEVELS, images
