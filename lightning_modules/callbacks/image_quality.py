"""The image quality of super-resolution: PSNR, SSIM, LPIPS, LR-PSNR, diversity and NIQE."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_modules.checkpoint_io import reason as reason_of
from lightning_modules.checks import check_count
from lightning_modules.metrics import image_mean
from lightning_modules.quality.extractors import WeightsMissing
from lightning_modules.quality.naturalness import Niqe, ParametersMissing
from lightning_modules.quality.perceptual import BACKBONES, Lpips
from lightning_modules.quality.super_resolution import (
    as_uint8,
    diversity,
    low_res_psnr,
    psnr_rgb,
    psnr_y,
    ssim_rgb_uniform,
    ssim_y_gaussian,
)
from lightning_modules.ranks import everywhere

LPIPS_NAMES = {"alex": "lpips", "vgg": "lpips_vgg"}
AVERAGE = "mean over images"
ROUNDING = "to the nearest level"  # of images to uint8
LEAST_SHARE = 0.0001  # a share of images that is not zero is not shown as zero

# Measures images by (image, reference, low_res), each (B, 3, ., .) uint8, as (B,) values.
Measure = Callable[[Tensor, Tensor, Tensor], Tensor]


class SuperResolved(NamedTuple):
    """What a super-resolution module returns from `validation_step` and `test_step`.

    Images are floats from 0 to 1, or uint8. For a scale s:

    low_res: (B, 3, h, w), what the module was given.
    high_res: (B, 3, s h, s w), the true images.
    samples: (n, B, 3, s h, s w), n images that the module made from each.
    """

    low_res: Tensor
    high_res: Tensor
    samples: Tensor


class Part(NamedTuple):
    """What one rank knows of an evaluation.

    images: how many images it measured. not_finite: for how many of them a sample has values that
    are not finite. n: the numbers of samples for each image. reasons: metric -> why an image has no
    such figure.
    """

    images: int
    not_finite: int
    n: frozenset[int]
    reasons: dict[str, str]


class ImageQuality(L.Callback):
    """Compares the images of a super-resolution module with the true ones.

    After a validation or a test it logs, with the prefix `val/` or `test/`:

      psnr, ssim       of all channels, as SRFlow's release (Lugmayr et al. 2020)
      psnr_y, ssim_y   of the luma, as most other papers
      lpips, lpips_vgg LPIPS by AlexNet and by VGG
      lr_psnr          whether the image, reduced, is the low-resolution one
      diversity        how much samples for the same image differ
      niqe             how far the image's statistics are from those of photographs

    Each is the mean over images. Only the diversity uses more than the first sample of an image, so
    the other figures do not depend on the number of samples. Images are rounded to uint8 first.
    Ranks may have unequal numbers of images.

    The step of the module has to return a `SuperResolved`. `protocol` tells what each figure
    depends on, and `not_measured` why a metric has no figure: the weights of LPIPS or the
    parameters of NIQE are missing, samples are not finite, or images are too small. Training goes
    on in all these cases.

    Args:
        scale: the side of an image over that of the low-resolution one.
        downscale: of uint8 images by the scale, with which the low-resolution images were made.
        lpips: "alex" and "vgg", or one of them, to the file of the network's weights; None:
            torch.hub's cache. Without any, LPIPS is not among the metrics.
        niqe: the function by which NIQE halves the sides of an image: see `Niqe`. None: NIQE is not
            among the metrics.

    Raises:
        ValueError: an argument is out of its range, or a file cannot be used.
    """

    def __init__(
        self,
        scale: int,
        downscale: Callable[[Tensor], Tensor],
        lpips: Mapping[str, str | Path | None],
        niqe: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_count("scale", scale, least=2)
        self.scale = scale
        self.downscale = downscale
        self.measures: dict[str, Measure] = {
            "psnr": without_low_res(psnr_rgb),
            "ssim": without_low_res(ssim_rgb_uniform),
            "psnr_y": without_low_res(functools.partial(psnr_y, crop=scale)),
            "ssim_y": without_low_res(functools.partial(ssim_y_gaussian, crop=scale)),
            "lr_psnr": self._low_res_psnr,
        }
        self.facts = facts_of(scale)
        self.pending: list[str] = []  # nets whose weights come from torch.hub's cache
        for net, path in lpips.items():
            if path is None and net in BACKBONES:
                self.pending.append(net)
            else:
                self._add(Lpips(net, path))
        self.halve = niqe  # until NIQE's parameters have been looked for
        self.obstacles: dict[str, str] = {}  # metric -> why it cannot be measured in this run
        self.protocol: dict[str, dict[str, Any]] = {}
        self.not_measured: dict[str, str] = {}
        self._begin()

    def _low_res_psnr(self, image: Tensor, reference: Tensor, low_res: Tensor) -> Tensor:
        return low_res_psnr(image, low_res, self.downscale)

    def _add(self, lpips: Lpips) -> None:
        name = LPIPS_NAMES[lpips.net]
        self.measures[name] = without_low_res(lpips)
        self.facts[name] = {**lpips.protocol, "average": AVERAGE, "rounding": ROUNDING}
        if not lpips.is_published:
            rank_zero_info(
                f"LPIPS by weights of SHA-256 {lpips.sha256[:8]}, which are not the published "
                "ones: it compares with no figure in a paper"
            )

    # ---------------------------------------------------------------------- when it is measured

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load LPIPS's networks and NIQE's parameters at the start of a run, once."""
        for net in self.pending:
            name = LPIPS_NAMES[net]
            networks: list[Lpips] = []
            obstacle: str | None = None
            # The first process of a machine loads it first, since it may download the weights.
            for is_first in (True, False):
                if is_first == (trainer.local_rank == 0):
                    obstacle = self._load(net, networks)
                trainer.strategy.barrier()
            found = next(filter(None, everywhere(obstacle)), None)
            if found is None:
                self._add(networks[0])
            else:
                self.obstacles[name] = found
                rank_zero_info(f"LPIPS by {BACKBONES[net].model}: not measured, {found}")
        self.pending = []
        if self.halve is not None:
            self._add_niqe(self.halve)
            self.halve = None

    def _load(self, net: str, networks: list[Lpips]) -> str | None:
        """Append the network to a list; or what keeps it from being loaded, in words."""
        try:
            networks.append(Lpips(net))
        except WeightsMissing as error:
            return (
                f"since the network's weights are missing ({error}): "
                f"give {BACKBONES[net].setting}=FILE"
            )
        return None

    def _add_niqe(self, halve: Callable[[Tensor], Tensor]) -> None:
        niqe: Niqe | None = None
        obstacle: str | None = None
        try:
            niqe = Niqe(halve)
        except ParametersMissing as error:
            obstacle = f"since {error}"
        found = next(filter(None, everywhere(obstacle)), None)
        if niqe is not None and found is None:
            self.measures["niqe"] = of_image_alone(niqe)
            self.facts["niqe"] = {**niqe.protocol, "average": AVERAGE}
        elif found is not None:
            self.obstacles["niqe"] = found
            rank_zero_info(f"NIQE: not measured, {found}")

    def _begin(self) -> None:
        """Forget the images of the last evaluation."""
        self.means: dict[str, MeanMetric] = {}
        self.images = 0
        self.not_finite = 0
        self.n: set[int] = set()
        self.reasons: dict[str, str] = {}

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin()

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._update(outputs, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._update(outputs, dataloader_idx)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._log(pl_module, "val/")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(pl_module, "test/")

    # ---------------------------------------------------------------------- how it is measured

    @torch.no_grad()
    def _update(self, outputs: object, dataloader_idx: int) -> None:
        """Measure the images of a batch.

        Raises ValueError, one line: the shapes do not fit, or there are several sets of images.
        """
        if not isinstance(outputs, SuperResolved):
            return
        if dataloader_idx > 0:
            raise ValueError(
                "ImageQuality measures one set of images at a time: test each with a call of its "
                "own"
            )
        check_shapes(outputs, self.scale)
        self.images += len(outputs.high_res)
        self.n.add(len(outputs.samples))
        is_finite = outputs.samples.isfinite().transpose(0, 1).flatten(1).all(1)
        self.not_finite += int((~is_finite).sum())
        if self.not_finite:
            return
        low_res = levels(outputs.low_res)
        reference = levels(outputs.high_res)
        samples = levels(outputs.samples)
        for name, measure in self.measures.items():
            self._add_values(name, functools.partial(measure, samples[0], reference, low_res))
        if len(samples) > 1:
            self._add_values("diversity", functools.partial(diversity, samples))

    def _add_values(self, name: str, measured: Callable[[], Tensor]) -> None:
        """Add the values of a batch to a mean; or note why there are none, which ends no run."""
        if name in self.reasons:
            return
        try:
            values = measured()
        except Exception as error:  # images that are too small, a GPU whose memory is full
            self.reasons[name] = f"since {reason_of(error) or type(error).__name__}"
            return
        if name not in self.means:
            self.means[name] = mean_on(values.device)
        self.means[name].update(values)

    def _log(self, pl_module: L.LightningModule, prefix: str) -> None:
        """Log the means over the images of all ranks, and note what could not be measured."""
        part = combined(
            everywhere(Part(self.images, self.not_finite, frozenset(self.n), self.reasons))
        )
        common = common_reason(part)
        for name in (*self.measures, *self.obstacles, "diversity"):
            key = f"{prefix}{name}"
            self.protocol.pop(key, None)
            self.not_measured.pop(key, None)
            reason = self.obstacles.get(name) or common or part.reasons.get(name)
            if name == "diversity" and reason is None:
                reason = reason_of_diversity(part.n)
            if reason is not None:
                self.not_measured[key] = reason
                continue
            # A rank without images has no mean yet, but has to take part in the sum over ranks.
            mean = self.means.get(name) or mean_on(pl_module.device)
            facts = dict(self.facts[name])
            if name == "diversity":
                facts["n"] = max(part.n)
            self.protocol[key] = facts | {"images": part.images}
            pl_module.log(key, mean.compute())
        if common is not None and prefix == "test/":
            rank_zero_info(f"PSNR and the other figures of images: not measured, {common}")
        for name in sorted(part.reasons):
            if common is None and prefix == "test/":
                rank_zero_info(f"{prefix}{name}: not measured, {part.reasons[name]}")


def without_low_res(measure: Callable[[Tensor, Tensor], Tensor]) -> Measure:
    """A measure of images and references, as one that ignores the low-resolution images."""

    def measured(image: Tensor, reference: Tensor, low_res: Tensor) -> Tensor:
        return measure(image, reference)

    return measured


def of_image_alone(measure: Callable[[Tensor], Tensor]) -> Measure:
    """A measure of images, as one that ignores the true and the low-resolution images."""

    def measured(image: Tensor, reference: Tensor, low_res: Tensor) -> Tensor:
        return measure(image)

    return measured


def facts_of(scale: int) -> dict[str, dict[str, Any]]:
    """What each metric but LPIPS and NIQE depends on, by the metric's name."""
    common = {"average": AVERAGE, "rounding": ROUNDING}
    rgb = {"definition": "rgb", "crop": 0} | common
    y = {
        "definition": "y",
        "crop": scale,
        "luma": "ITU-R BT.601, 16 to 235, not rounded",
    } | common
    return {
        "psnr": rgb,
        "ssim": rgb | {"window": "uniform 7 x 7", "covariance": "unbiased"},
        "psnr_y": y,
        "ssim_y": y | {"window": "Gaussian 11 x 11, deviation 1.5"},
        "lr_psnr": {"definition": "rgb"} | common,
        "diversity": {"definition": "unbiased deviation, uint8"} | common,
    }


def mean_on(device: torch.device) -> MeanMetric:
    """A mean over images in float64."""
    mean = image_mean()
    mean.set_dtype(torch.float64)
    return mean.to(device)


def levels(images: Tensor) -> Tensor:
    """Images from 0 to 1, or uint8, as uint8."""
    if images.dtype == torch.uint8:
        return images
    return as_uint8(images.float())  # 16 bits are too few for the rounding


def combined(parts: list[Part]) -> Part:
    """What all ranks know together."""
    reasons: dict[str, str] = {}
    for part in reversed(parts):
        reasons |= part.reasons
    return Part(
        sum(part.images for part in parts),
        sum(part.not_finite for part in parts),
        frozenset().union(*(part.n for part in parts)),
        reasons,
    )


def common_reason(part: Part) -> str | None:
    """Why nothing can be measured; None: it can.

    >>> common_reason(Part(200, 1, frozenset([4]), {}))
    'since for 0.50% of 200 images a sample is not finite: give a lower temperature'
    """
    if part.images == 0:
        return "since the module has returned no images"
    if part.not_finite:
        share = max(part.not_finite / part.images, LEAST_SHARE)
        return (
            f"since for {share:.2%} of {part.images:,} images a sample is not finite: "
            "give a lower temperature"
        )
    return None


def reason_of_diversity(n: frozenset[int]) -> str | None:
    """Why there is no diversity of n samples for each image; None: there is one."""
    if min(n) < 2:
        return "since it needs at least 2 samples for each image"
    if len(n) > 1:
        return "since images have unequal numbers of samples"
    return None


def check_shapes(images: SuperResolved, scale: int) -> None:
    """ValueError, one line: the shapes of what a module returned do not fit."""
    low = tuple(images.low_res.shape)
    high = tuple(images.high_res.shape)
    made = tuple(images.samples.shape)
    expected = (*low[:2], *(scale * side for side in low[2:]))
    if high != expected or made[1:] != high or made[0] == 0:
        raise ValueError(
            f"low_res {low}, high_res {high} and samples {made} do not fit a scale of {scale}: "
            "they have to be (B, 3, h, w), (B, 3, s h, s w) and (n, B, 3, s h, s w)"
        )
