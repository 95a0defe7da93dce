"""The image quality of samples: FID, KID, Inception Score, precision and recall."""

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, distributed
from torch.utils.data import Dataset

from flows.caching import cached
from lightning_modules.callbacks.samples import as_levels, evaluating
from lightning_modules.checkpoint_io import reason
from lightning_modules.checks import check_count
from lightning_modules.objective import Objective, as_objective, data_of
from lightning_modules.precision import evaluation
from lightning_modules.quality.distributions import (
    LEAST,
    METRICS,
    Comparison,
    compare_distributions,
)
from lightning_modules.quality.extractors import Extractor, Features, Inception, WeightsMissing
from lightning_modules.ranks import everywhere
from lightning_modules.stopping import AgreedError
from results import is_number
from results.files import write

SPLITS = ("train", "val", "test")
THOUSAND = 1000  # figures on few samples are named by thousands of samples
LEAST_SHARE = 0.0001  # a share of samples that is not zero is not shown as zero
T = TypeVar("T")


class NotMeasured(Exception):
    """Raised on all ranks at the same point: there are no figures. The message says why."""


class SampleQuality(L.Callback):
    """Compares samples with images of the data, by the features of a network.

    At the end of a run `test/fid`, `test/kid`, `test/inception_score`, `test/precision` and
    `test/recall` are logged, of `n` samples of the tested weights. During training `val/fid_5k` and
    `val/kid_5k` may be logged, of `small_n` = 5,000 samples. A figure on few samples is larger than
    one on many, so the two never share a name.

    Samples and images are uint8. Images are not augmented. Grey images are repeated in three
    channels. Samples are drawn in float32 and in batches of a fixed size, each with its own seed,
    and the batches are shared by all ranks, so that any number of ranks gives the same figures.

    `protocol` tells what each figure depends on, and `not_measured` why a metric has no figure.
    Training goes on where the network's weights are missing, where samples are not finite, and
    where something else goes wrong, such as a GPU whose memory is full.

    Args:
        n: how many samples are drawn at the end of a run; 0: none.
        small_n: the same during training, in whole thousands.
        every_n_steps: the smallest number of steps between two measurements during training; None:
            none are made.
        temperature: of the samples.
        reference: the split of the images: train, val or test.
        reference_n: how many images of the split are taken, the first ones; None: all.
        seed: of the samples, and of KID's subsets.
        batch_size: how many images are handled at once.
        weights: the file of the network's weights; None: torch.hub's cache.
        cache: the folder in which the features of images are kept; None: they are not kept.
        make_extractor: makes the network from `weights`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        n: int = 0,
        small_n: int = 5000,
        every_n_steps: int | None = None,
        temperature: float = 1.0,
        reference: str = "train",
        reference_n: int | None = None,
        seed: int = 0,
        batch_size: int = 100,
        weights: str | Path | None = None,
        cache: Path | None = None,
        make_extractor: Callable[[str | Path | None], Extractor] = Inception,
    ) -> None:
        check_count("quality.n", n, least=0)
        if n == 1:
            raise ValueError("quality.n=1 is no distribution: give at least 2, or 0 for none")
        check_count("quality.small_n", small_n, least=THOUSAND)
        if small_n % THOUSAND:
            raise ValueError(f"quality.small_n={small_n}: give whole thousands, such as 5000")
        if every_n_steps is not None:
            check_count("samples.quality_every_n_steps", every_n_steps, least=1)
        if not is_number(temperature) or temperature < 0:
            raise ValueError(f"quality.temperature={temperature}: give a number of at least 0")
        if reference not in SPLITS:
            raise ValueError(f"quality.reference={reference}: give {', '.join(SPLITS)}")
        if reference_n is not None:
            check_count("quality.reference_n", reference_n, least=2)
        check_count("quality.seed", seed)
        check_count("quality.batch_size", batch_size, least=1)
        self.n = n
        self.small_n = small_n
        self.every_n_steps = every_n_steps
        self.temperature = temperature
        self.reference = reference
        self.reference_n = reference_n
        self.seed = seed
        self.batch_size = batch_size
        self.weights = weights
        self.cache = cache
        self.make_extractor = make_extractor
        self.measured_at = 0  # the step of the newest measurement in training
        self.extractor: Extractor | None = None
        self.obstacle: str | None = None  # why nothing can be measured in this run
        self.reference_features: Tensor | None = None
        self.protocol: dict[str, dict[str, Any]] = {}
        self.not_measured: dict[str, str] = {}

    def state_dict(self) -> dict[str, Any]:
        """The step of the newest measurement in training."""
        return {"measured_at": self.measured_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.measured_at = state_dict["measured_at"]

    # ---------------------------------------------------------------------- when it is measured

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the network at the start of a run, not when it is needed for the first time.

        Raises AgreedError, one line: `weights` cannot be used.
        """
        is_used = self.n > 0 or (stage == "fit" and self.every_n_steps is not None)
        if not is_used or self.extractor is not None or self.obstacle is not None:
            return
        objective = as_objective(pl_module)
        if not models_images(objective):
            self.obstacle = "since the data are no images with one channel or three"
            return
        self.obstacle = self._load_extractor(trainer)
        extractor = cast(Extractor, self.extractor)
        if self.obstacle is not None:
            rank_zero_info(f"FID and the other figures of samples: not measured, {self.obstacle}")
        elif not extractor.is_published:
            rank_zero_info(
                f"FID by weights of SHA-256 {extractor.sha256[:8]}, which are not the published "
                "ones: it compares with no figure in a paper"
            )

    def _load_extractor(self, trainer: L.Trainer) -> str | None:
        """Load the network on every rank; what keeps one of the ranks from it, in words.

        The first process of a machine loads it first, since it may download the weights. All ranks
        raise the error of a file that one of them cannot use: none may wait for another.
        """
        own: tuple[str | None, str | None] = (None, None)
        for is_first in (True, False):
            if is_first == (trainer.local_rank == 0):
                own = self._try_extractor()
            trainer.strategy.barrier()
        gathered = everywhere(own)
        for _, mistake in gathered:
            if mistake is not None:
                raise AgreedError(f"metrics.inception_weights: {mistake}")
        return next((obstacle for obstacle, _ in gathered if obstacle is not None), None)

    def _try_extractor(self) -> tuple[str | None, str | None]:
        """Load the network; why its weights are missing, and why the user's file is not usable."""
        try:
            self.extractor = self.make_extractor(self.weights)
        except WeightsMissing as error:
            obstacle = (
                f"since the network's weights are missing ({error}): "
                "give metrics.inception_weights=FILE"
            )
            return obstacle, None
        except ValueError as error:
            return None, str(error)
        return None, None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        every = self.every_n_steps
        if every is None or trainer.sanity_checking or self.extractor is None:
            return
        if self.obstacle is not None or trainer.global_step < self.measured_at + every:
            return
        self.measured_at = trainer.global_step
        suffix = f"_{self.small_n // THOUSAND}k"
        self._measure(trainer, pl_module, self.small_n, "val/", suffix, ("fid", "kid"))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.n == 0:
            return
        if self.obstacle is not None:
            self._give_up(self.obstacle, "test/", "", METRICS)
            return
        self._measure(trainer, pl_module, self.n, "test/", "", METRICS)

    # ---------------------------------------------------------------------- how it is measured

    @torch.no_grad()
    def _measure(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        n: int,
        prefix: str,
        suffix: str,
        names: tuple[str, ...],
    ) -> None:
        """Draw n samples, compare them with the reference, and log `<prefix><name><suffix>`.

        No error of it ends a run: a training that may have taken days is worth more than a figure.
        """
        extractor = cast(Extractor, self.extractor)
        objective = as_objective(pl_module)
        try:
            with evaluating(objective), evaluation(objective.device.type):
                drawn = self._draw(trainer, objective, n)
                reference = self._reference(trainer, objective)
            figures, facts = self._compare(trainer, drawn, reference)
        except NotMeasured as obstacle:
            self._give_up(str(obstacle), prefix, suffix, names)
            rank_zero_info(f"FID and the other figures of samples: not measured, {obstacle}")
            return
        common = {
            "n": n,
            "temperature": float(self.temperature),
            "reference": self.reference,
            "reference_n": len(reference),
            "extractor": extractor.name,
            "layer": extractor.layer,
            "resize": extractor.resize,
            "weights_sha256": extractor.sha256,
            "published_weights": extractor.is_published,
            "statistics": "float64",
            "images": "uint8",
            "seed": self.seed,
            "batch_size": self.batch_size,  # each batch of samples has a seed of its own
        }
        for name in names:
            key = f"{prefix}{name}{suffix}"
            self.protocol.pop(key, None)
            self.not_measured.pop(key, None)
            if name not in figures:
                self.not_measured[key] = absence(name, extractor)
                continue
            if not math.isfinite(figures[name]):
                self.not_measured[key] = f"since it is {figures[name]}, no number"
                continue
            self.protocol[key] = common | facts[name]
            pl_module.log(key, figures[name])

    def _give_up(self, obstacle: str, prefix: str, suffix: str, names: tuple[str, ...]) -> None:
        for name in names:
            key = f"{prefix}{name}{suffix}"
            self.protocol.pop(key, None)
            self.not_measured[key] = obstacle

    def _draw(self, trainer: L.Trainer, objective: Objective, n: int) -> Features:
        """The features of n samples, on every rank. Raises NotMeasured."""
        rows, n_wrong = together(
            "samples cannot be drawn", lambda: self._own_samples(trainer, objective, n)
        )
        n_wrong = sum(everywhere(n_wrong))
        if n_wrong:
            share = max(n_wrong / n, LEAST_SHARE)
            raise NotMeasured(
                f"since {share:.2%} of {n:,} samples at T={self.temperature:g} are not finite: "
                "give a lower quality.temperature, or see Stability in results/index.html"
            )
        layer = self._gathered(trainer, [part.layer for part in rows], n, objective.device)
        has_logits = everywhere(bool(rows) and rows[0].logits is not None)
        if not has_logits[0]:
            return Features(layer, None)
        logits = [cast(Tensor, part.logits) for part in rows]
        return Features(layer, self._gathered(trainer, logits, n, objective.device))

    def _own_samples(
        self, trainer: L.Trainer, objective: Objective, n: int
    ) -> tuple[list[Features], int]:
        """The features of this rank's samples by batch, and how many samples are not finite.

        The features are complete only if all samples are finite.
        """
        rows: list[Features] = []
        n_wrong = 0
        with cached(objective.trained):
            for k in self._own(trainer, math.ceil(n / self.batch_size), "samples"):
                seed = batch_seed(self.seed, k)
                batch = objective.draw(self.batch_size, self.temperature, seed)
                if batch is None:
                    raise NotMeasured("since the model draws samples for given contexts alone")
                batch = batch[: n - k * self.batch_size]
                n_wrong += int((~batch.isfinite().flatten(1).all(1)).sum())
                if n_wrong == 0:
                    levels = in_colour(as_levels(batch, objective.n_bits or 8))
                    rows.append(cast(Extractor, self.extractor)(levels))
        return rows, n_wrong

    def _compare(self, trainer: L.Trainer, drawn: Features, reference: Tensor) -> Comparison:
        """The figures, which rank 0 computes, on every rank. Raises NotMeasured."""

        def on_one_rank() -> Comparison:
            if not trainer.is_global_zero:
                return Comparison({}, {})
            return compare_distributions(drawn.layer, reference, drawn.logits, self.seed)

        return trainer.strategy.broadcast(together("samples cannot be compared", on_one_rank))

    def _reference(self, trainer: L.Trainer, objective: Objective) -> Tensor:
        """The features of the reference images, (m, d), on every rank; from the cache if there.

        Raises NotMeasured.
        """
        if self.reference_features is not None:
            return self.reference_features
        problem = "the reference images cannot be read"
        data, n, path, features = together(problem, lambda: self._look_up(trainer, objective))
        if not all(everywhere(features is not None)):  # all compute where one has no file
            rows = together(problem, lambda: self._own_images(trainer, objective, data, n))
            features = self._gathered(trainer, rows, n, objective.device)
            if trainer.is_global_zero and path is not None:
                keep_features(path, features)
        self.reference_features = cast(Tensor, features)
        return self.reference_features

    def _look_up(
        self, trainer: L.Trainer, objective: Objective
    ) -> tuple[Dataset, int, Path | None, Tensor | None]:
        """The reference images, how many of them are taken, their file in the cache, its features.

        Without a cache there is no file.
        """
        data = self._images(trainer)
        n = len(cast(Any, data))
        if self.reference_n is not None:
            n = min(n, self.reference_n)
        if n < LEAST:
            raise NotMeasured(
                f"since there are {n} {self.reference} images: give another quality.reference"
            )
        if self.cache is None:
            return data, n, None, None
        path = self.cache / f"{self._fingerprint(data, n, objective)}.safetensors"
        return data, n, path, read_features(path, n)

    def _own_images(
        self, trainer: L.Trainer, objective: Objective, data: Dataset, n: int
    ) -> list[Tensor]:
        """The features of this rank's reference images, by batch."""
        rows = []
        for k in self._own(trainer, math.ceil(n / self.batch_size), "reference images"):
            images = self._batch(data, k, n, objective).to(objective.device)
            rows.append(cast(Extractor, self.extractor)(in_colour(images)).layer)
        return rows

    def _images(self, trainer: L.Trainer) -> Dataset:
        """The reference split, without augmentation."""
        return data_of(trainer).unaugmented(self.reference)

    def _batch(self, data: Dataset, k: int, n: int, objective: Objective) -> Tensor:
        """Batch k of the first n reference images, (b, C, H, W) uint8 from 0 to 255."""
        first = k * self.batch_size
        numbers = range(first, min(first + self.batch_size, n))
        images = torch.stack([data[(0, number)][0] for number in numbers])
        return images << (8 - (objective.n_bits or 8))

    def _fingerprint(self, data: Dataset, n: int, objective: Objective) -> str:
        """A hash of the first n reference images, the network, and its layer."""
        extractor = cast(Extractor, self.extractor)
        hashed = hashlib.sha256(f"{extractor.name} {extractor.layer} {extractor.sha256}".encode())
        for k in range(math.ceil(n / self.batch_size)):
            images = self._batch(data, k, n, objective)
            hashed.update(str(tuple(images.shape)).encode())
            hashed.update(images.numpy().tobytes())
        return hashed.hexdigest()

    def _own(self, trainer: L.Trainer, n_batches: int, unit: str) -> Iterator[int]:
        """The numbers of this rank's batches, with a bar on rank 0's terminal."""
        own = range(trainer.global_rank, n_batches, trainer.world_size)
        hidden = not (trainer.is_global_zero and sys.stderr.isatty())
        with Tqdm(total=len(own) * self.batch_size, unit=f" {unit}", disable=hidden) as bar:
            for k in own:
                yield k
                bar.update(self.batch_size)

    def _gathered(
        self, trainer: L.Trainer, rows: list[Tensor], n: int, device: torch.device
    ) -> Tensor:
        """The rows of all ranks' batches in the order of the batches, (n, d) float64 on the CPU.

        Networks compute features in float32, in which the ranks exchange them.
        """
        if not distributed.is_initialized():
            return torch.cat(rows)
        n_batches = math.ceil(n / self.batch_size)
        most = math.ceil(n_batches / trainer.world_size)
        widths = [rows[0].shape[1] if rows else 0]
        distributed.broadcast_object_list(widths, src=0)
        own = torch.zeros(most, self.batch_size, widths[0], device=device)
        for i, part in enumerate(rows):
            own[i, : len(part)] = part.float().to(device)
        everything = [torch.zeros_like(own) for _ in range(trainer.world_size)]
        distributed.all_gather(everything, own)
        in_order = torch.stack(everything, 1).flatten(0, 2)[:n]
        return in_order.double().cpu()


def together(problem: str, make: Callable[[], T]) -> T:
    """What `make` returns on this rank. All ranks have to call it.

    Raises NotMeasured on all ranks: there has been an error on one of them.
    problem: what is not possible then, for the message.
    """
    value: T | None = None
    failure: str | None = None
    try:
        value = make()
    except NotMeasured as error:
        failure = str(error)
    except Exception as error:
        failure = f"since {problem}: {reason(error) or type(error).__name__}"
    for each in everywhere(failure):
        if each is not None:
            raise NotMeasured(each)
    return cast(T, value)


def models_images(objective: Objective) -> bool:
    """Whether the data of an objective are images with one channel or three."""
    shape = objective.shape
    return shape is not None and len(shape) == 3 and shape[0] in (1, 3)


def in_colour(images: Tensor) -> Tensor:
    """Images with three channels, (B, 3, H, W), of images with one or three."""
    return images.expand(-1, 3, -1, -1)


def absence(name: str, extractor: Extractor) -> str:
    """Why a metric has no figure although others have one."""
    if name == "inception_score":
        return f"since layer {extractor.layer} of {extractor.name} is not followed by classes"
    return "since there are too few samples or images: give a larger quality.n"


def batch_seed(seed: int, k: int) -> int:
    """The seed of the base samples of batch k."""
    return int(np.random.SeedSequence([seed, k]).generate_state(1, np.uint64)[0])


def read_features(path: Path, n: int) -> Tensor | None:
    """Features of n images from a file; None if there is no file, or a damaged one."""
    try:
        features = load_file(path)["features"]
    except (OSError, SafetensorError, KeyError):
        return None
    if features.ndim != 2 or len(features) != n or not features.isfinite().all():
        return None
    return features.double()


def keep_features(path: Path, features: Tensor) -> None:
    """Write features to a file in one step; a folder that cannot be written is no obstacle."""
    content: Mapping[str, Tensor] = {"features": features.float().contiguous()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, safetensors_bytes(dict(content)))
    except OSError as error:
        rank_zero_info(
            f"the features of the images are not kept: {path.parent} cannot be written "
            f"({reason(error)})"
        )
