"""A trained model as an object, for notebooks and commands: `from reproduce import load`."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Self, cast

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from datamodules.checks import check_memory, expand_home, is_number
from datamodules.dequantization import Dequantizer, UniformDequantizer
from flows.base import FlowModel
from lightning_modules.callbacks.samples import as_levels
from lightning_modules.density import DensityModule
from lightning_modules.objective import Data, Objective
from lightning_modules.precision import evaluation
from reproduce.config import ConfigError, nearest
from reproduce.run_folder import mismatch
from reproduce.stored import PARTS, Stored, as_safetensors, read_stored
from results.files import write

# What constructors raise for a recipe that lacks something, or is of another version of the code.
UNFIT_RECIPE = (
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    MemoryError,
    OmegaConfBaseException,
)
Images = Tensor | np.ndarray
Labels = Tensor | np.ndarray | Sequence[int] | Sequence[str] | None
Latents = tuple[Tensor, ...]


def load_model(model: str | Path) -> "TrainedModel":
    """Load a trained model onto the CPU. `read_stored` says what `model` may be.

    ConfigError, ValueError or FileNotFoundError, one line: there is nothing to load.
    """
    return TrainedModel(read_stored(model))


class RecordedData:
    """What a model has to know of the data that it was trained on, without reading them.

    It is the part of `Data` (lightning_modules/objective.py) that an objective reads when it is
    made.
    """

    def __init__(self, origin: dict[str, Any]) -> None:
        self.shape: tuple[int, ...] = tuple(origin["shape"] or ())
        self.n_bits: int | None = origin["n_bits"]
        self.class_names: tuple[str, ...] = tuple(origin["class_names"])
        self.labels = bool(origin["config"]["data"].get("labels"))
        self.n_classes = len(self.class_names) or None
        self.dequantizer: Dequantizer | None = None
        if self.n_bits is not None:
            self.dequantizer = UniformDequantizer(self.n_bits)


class StoredModel:
    """A trained model of any kind, a flow or the network of a regression, on the CPU.

    No parameter requires a gradient.

    objective: the module with these weights, in eval mode.
    network: the trained flow or other network, and what: "flow" or "network".
    shape: the shape of one datum, such as (3, 32, 32); None is any size.
    n_bits: the bits of the integers that are modelled; None for real numbers.
    class_names: the names of the classes that the model is conditioned on; () without classes.
    experiment, config, commit: the experiment, its whole recipe, and the commit that trained it.
    result: the result of the test of these weights, as in result.json; None without a test.
    stored: the weights as they were read, and everything that is known of them.

    ConfigError, one line: the weights do not fit this version of the model.
    """

    what = "network"

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        origin = stored.origin
        self.experiment: str = origin["experiment"]
        self.config: DictConfig = OmegaConf.create(origin["config"])
        self.commit: str | None = origin["commit"]
        self.result = stored.result
        data = RecordedData(origin)
        self.objective = self.module(cast(Data, data))
        self.objective.requires_grad_(False).eval()
        self.shape: tuple[int | None, ...] = tuple(self.objective.shape or ())
        self.n_bits = data.n_bits
        self.class_names: tuple[str, ...] = ()

    @property
    def network(self) -> nn.Module:
        return self.objective.trained

    def module(self, data: Data, config: DictConfig | None = None) -> Objective:
        """A new objective with these weights, for a Trainer: `trainer.test(model.module(data))`.

        data: a datamodule. config: a recipe with other settings of evaluation; None: the model's.

        ConfigError, one line: the weights do not fit the model of the recipe or of the data.
        """
        return make_objective(self.stored, data, self.config if config is None else config)


def stored_model(stored: Stored) -> StoredModel:
    """The model of stored weights: a `TrainedModel` if it is a flow."""
    model = StoredModel(stored)
    if isinstance(model.objective, DensityModule):
        return TrainedModel(stored)
    return model


class TrainedModel(StoredModel):
    """A trained flow, and what it was trained on. It is in eval mode, in float32, on the CPU.

    No parameter requires a gradient, so nothing that is computed keeps a graph. Where images go in
    or come out, they are uint8 from 0 to 255, (N, C, H, W), also for a flow that was trained on
    fewer bits.

    >>> from reproduce import load
    >>> model = load("glow_cifar10/cpu-seed0")  # doctest: +SKIP
    >>> images = model.sample(16, temperature=0.7)  # doctest: +SKIP
    >>> model.bits_per_dim(images).shape  # doctest: +SKIP
    torch.Size([16])

    flow: the bare `FlowModel`, which takes real numbers.
    dequantizer: makes real numbers of integers; None for a flow of real numbers.
    shape: the shape of one datum, such as (3, 32, 32); None is any size.
    n_bits: the bits of the integers that the flow models; None for real numbers.
    class_names: the names of the classes that the flow is conditioned on; () without classes.
    experiment, config, commit: the experiment, its whole recipe, and the commit that trained it.
    result: the result of the test of these weights, as in result.json; None without a test.
    stored: the weights as they were read, and everything that is known of them.

    ConfigError, one line: the weights are not of a flow, or do not fit this version of it.
    """

    what = "flow"

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored)
        objective = self.objective
        if not isinstance(objective, DensityModule):
            raise ConfigError(
                f"{stored.path} is of {self.experiment}, which trains no flow: load another run"
            )
        self._objective = objective
        self.flow: FlowModel = objective.flow
        self.dequantizer: nn.Module | None = objective.dequantizer
        n_classes = self.flow.n_classes
        if n_classes is not None:
            names = tuple(stored.origin["class_names"])
            self.class_names = names or tuple(map(str, range(n_classes)))

    @property
    def network(self) -> nn.Module:
        return self.flow

    def __repr__(self) -> str:
        flow = type(self.flow).__name__
        return f"TrainedModel({flow} of {self.experiment}, shape={self.shape}, {self.stored.path})"

    @property
    def device(self) -> torch.device:
        """The device that the flow is on."""
        return next(self.flow.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Move the model to a device, such as "cuda"; returns the model itself."""
        self._objective.to(torch.device(device))
        return self

    def save(self, path: str | Path) -> None:
        """Write the weights, and what is needed to build the model, to a safetensors file.

        `reproduce.load` loads the file. ValueError, one line: it has not the ending .safetensors.
        """
        target = expand_home("path", path)
        if target.suffix != ".safetensors":
            raise ValueError(f"{path}: give a name that ends with .safetensors")
        write(target, as_safetensors(self.stored))

    # ------------------------------------------------------------------ likelihood

    def bits_per_dim(
        self,
        images: Images,
        labels: Labels = None,
        noise_samples: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        keys: Tensor | None = None,
    ) -> Tensor:
        """Bits per dimension of images, (N,) float32 on the CPU: the smaller, the more likely.

        An image's noise is a function of `seed` and its key. For the images of a test split in
        their order, with the run's eval.noise_seed, the mean is the run's own test/bpd. That does
        not hold for averaged weights (EMA) of a flow with batch norm, which a test evaluates with
        statistics that it estimates anew.

        images: uint8 from 0 to 255, (N, *shape), a tensor or an array.
        labels: the classes of the images, (N,), for a class-conditional flow: names or numbers.
        noise_samples: how many samples of the dequantisation noise are drawn for an image; the
            result is their mean.
        seed: of the noise.
        batch_size: how many images are computed at once.
        keys: (N,) int64 of at least 0; None: 0 to N - 1.

        ValueError, one line: the images or labels do not fit the model.
        """
        n = self._n_images(images)
        classes = self._classes(labels, n)
        _check_at_least("noise_samples", noise_samples, 1)
        _check_at_least("seed", seed, 0)
        if keys is None:
            keys = torch.arange(n)
        is_whole = isinstance(keys, Tensor) and keys.dtype == torch.int64
        if not is_whole or tuple(keys.shape) != (n,) or (n and int(keys.min()) < 0):
            raise ValueError(f"keys are {n} numbers of at least 0, as an int64 tensor ({n},)")
        means = [torch.zeros(0)]
        for rows in _batches(n, batch_size):
            batch = [self._integers(images, rows), keys[rows]]
            context = self._context(classes, rows)
            if context is not None:
                batch.append(context)
            total = torch.zeros(len(batch[0]), dtype=torch.float64)
            for k in range(noise_samples):
                total += self._measured(batch, seed, k).double().cpu()
            means.append((total / noise_samples).float())
        return torch.cat(means)

    def _measured(self, batch: list[Tensor], seed: int, k: int) -> Tensor:
        """Bits per dimension of a batch with its noise sample k, (B,)."""
        self._objective.noise_seed = seed
        with self._computing():
            sample = self._objective.input_of(batch, k)
            log_prob = self.flow.log_prob(*sample.arguments) + sample.log_weight
            return self._objective.loss_per_datum(log_prob.detach(), sample.x[0].numel())

    # ------------------------------------------------------------------ samples

    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        label: int | str | None = None,
        seed: int = 0,
        first: int = 0,
        batch_size: int = 64,
    ) -> Tensor:
        """Draw n images, (n, *shape) uint8 from 0 to 255, on the CPU.

        Pixels that are not finite are magenta in colour images and white in grey ones, as in the
        pictures of a run. The arguments are those of `draw`.

        ValueError, one line: the flow is none of images, or an argument is out of its range.
        """
        self._check_images("sample")
        parts = self._drawn_parts(n, temperature, label, seed, first, batch_size)
        return torch.cat([as_levels(part, self._depth) for part in parts])

    def draw(
        self,
        n: int,
        temperature: float = 1.0,
        label: int | str | None = None,
        seed: int = 0,
        first: int = 0,
        batch_size: int = 64,
    ) -> Tensor:
        """Draw n samples as the flow makes them, (n, *shape) float32 on the CPU.

        Images are about in [0, 1], neither clipped nor rounded, and NaN where they are not finite.
        Sample i is a function of `seed` and `first + i` alone, so samples can be drawn in parts.
        (Other batch sizes may change the last digits of a float.)

        n: how many.
        temperature: multiplies the standard deviation of the latents.
        label: a class, by name or number; None: all classes in turn.
        seed: of the latents.
        first: the number of the first sample.
        batch_size: how many are computed at once.

        ValueError, one line: an argument is out of its range or does not fit the flow.
        """
        return torch.cat(list(self._drawn_parts(n, temperature, label, seed, first, batch_size)))

    def _drawn_parts(
        self,
        n: int,
        temperature: float,
        label: int | str | None,
        seed: int,
        first: int,
        batch_size: int,
    ) -> Iterator[Tensor]:
        """The samples of `draw` in parts, one for each batch; the first part has no sample."""
        _check_at_least("n", n, 0)
        _check_at_least("first", first, 0)
        _check_at_least("seed", seed, 0)
        if isinstance(temperature, np.floating | np.integer):
            temperature = temperature.item()
        if not is_number(temperature) or not 0 <= temperature < math.inf:
            raise ValueError(f"temperature={temperature!r}: give a number of at least 0")
        shape = self._sample_shape()
        check_memory(f"n={n}", 4 * n * math.prod(shape))
        classes = self._classes_of_samples(n, label, first)
        yield torch.zeros(0, *shape)
        for rows in _batches(n, batch_size):
            numbers = range(first + rows.start, first + rows.stop)
            context = self._context(classes, rows)
            yield self._drawn(numbers, temperature, seed, context, shape)

    def _drawn(
        self,
        numbers: range,
        temperature: float,
        seed: int,
        context: Tensor | None,
        shape: tuple[int, ...],
    ) -> Tensor:
        """The samples of some numbers, (len(numbers), *shape), on the CPU."""
        shapes = self.flow.latent_shapes(shape)
        like = next(self.flow.parameters())
        single = []
        for number in numbers:
            key = int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])
            generator = torch.Generator().manual_seed(key)
            single.append(self.flow.base.sample(1, shapes, temperature, generator, like))
        latents = tuple(torch.cat(level) for level in zip(*single, strict=True))
        samples = self._inverse(latents, context)
        return samples.where(samples.isfinite(), torch.nan)

    # ------------------------------------------------------------------ latents

    def encode(self, images: Images, labels: Labels = None, batch_size: int = 64) -> Latents:
        """The latents of images: a tuple with one tensor (N, *latent_shape) for each level.

        An integer stands for the middle of its bin, so that `decode` gives the same image back.
        The latents are on the device of the model. The arguments are those of `bits_per_dim`.
        """
        n = self._n_images(images)
        classes = self._classes(labels, n)
        shapes = self.flow.latent_shapes(tuple(images.shape[1:]))
        like = next(self.flow.parameters())
        parts: list[Latents] = [tuple(like.new_zeros(0, *shape) for shape in shapes)]
        for rows in _batches(n, batch_size):
            context = self._context(classes, rows)
            parts.append(self._encoded(self._integers(images, rows), context))
        return tuple(torch.cat(level) for level in zip(*parts, strict=True))

    def _encoded(self, q: Tensor, context: Tensor | None) -> Latents:
        dequantizer = cast(Dequantizer, self.dequantizer)
        middle = {"uniform": 0.5, "normal": 0.0}[dequantizer.noise]
        noise = torch.full(q.shape, middle, device=self.device)
        with self._computing():
            x, _ = dequantizer(q, noise, context)
            latents, _ = self.flow(x, context)
        return tuple(level.detach() for level in latents)

    def decode(self, latents: Latents, labels: Labels = None, batch_size: int = 64) -> Tensor:
        """The images of latents, (N, *shape) uint8 from 0 to 255, on the CPU.

        latents: a tuple with one tensor (N, *latent_shape) for each level, as `encode` returns.
        labels: the classes of the images, (N,), for a class-conditional flow.

        ValueError, one line: the latents or labels do not fit the model.
        """
        self._check_images("decode")
        n = self._n_latents(latents)
        classes = self._classes(labels, n)
        images = [torch.zeros(0, *self._sample_shape())]
        for rows in _batches(n, batch_size):
            context = self._context(classes, rows)
            images.append(self._inverse(tuple(z[rows].to(self.device) for z in latents), context))
        return as_levels(torch.cat(images), self._depth)

    def _inverse(self, latents: Latents, context: Tensor | None) -> Tensor:
        with self._computing():
            x, _ = self.flow.inverse(latents, context)
        return x.detach().cpu()

    # ------------------------------------------------------------------ checks

    def label_of(self, label: int | str) -> int:
        """The number of a class from its name, from the number as text, or from the number.

        ValueError, one line: the flow has no such class. The nearest name is named.
        """
        names = self.class_names
        if not names:
            raise ValueError(f"label={label}: this {type(self.flow).__name__} has no classes")
        text = str(label)
        if isinstance(label, str) and text in names:
            return names.index(text)
        if text.isdecimal() and int(text) < len(names):
            return int(text)
        raise ValueError(
            f"label={label} is not known{nearest(text, names)}: give {', '.join(names)}, "
            f"or a number from 0 to {len(names) - 1}"
        )

    @property
    def _depth(self) -> int:
        """The bits of the images that are shown. Real numbers are shown with 8."""
        return self.n_bits or 8

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Compute in float32, and without gradients unless the flow itself needs them."""
        with (
            evaluation(self.device.type),
            torch.inference_mode(False),
            torch.set_grad_enabled(self.flow.needs_autograd),
        ):
            yield

    def _check_images(self, method: str) -> None:
        """ValueError: the flow is none of images."""
        if len(self.shape) != 3:
            raise ValueError(
                f"{method} is for images, and this {type(self.flow).__name__} is a flow of data of "
                f"shape {self.shape}: use model.flow"
            )

    def _sample_shape(self) -> tuple[int, ...]:
        """The shape of a sample. ValueError: the model has no fixed size."""
        sides = tuple(side for side in self.shape if side is not None)
        if len(sides) < len(self.shape):
            raise ValueError(
                f"this {type(self.flow).__name__} models data of any size: use model.flow"
            )
        return sides

    def _n_latents(self, latents: Latents) -> int:
        """How many data the latents are of. ValueError: they do not fit the flow."""
        shapes = self.flow.latent_shapes(self._sample_shape())
        sizes: list[tuple[int, ...]] = []
        if isinstance(latents, tuple | list):
            sizes = [tuple(z.shape) for z in latents if isinstance(z, Tensor)]
        n = sizes[0][0] if sizes and sizes[0] else 0
        if sizes != [(n, *shape) for shape in shapes]:
            texts = [f"(N, {', '.join(map(str, shape))})" for shape in shapes]
            raise ValueError(
                f"latents are a tuple of tensors, {', '.join(texts)}, as encode returns"
            )
        return n

    def _n_images(self, images: Images) -> int:
        """How many images there are. ValueError: they are no images of the flow."""
        if self.n_bits is None:
            raise ValueError(
                f"this {type(self.flow).__name__} is a flow of real numbers, not of images: "
                "use model.flow.log_prob, in nats"
            )
        sides = ", ".join("any" if side is None else str(side) for side in self.shape)
        request = f"give images as uint8 from 0 to 255, (N, {sides})"
        if not isinstance(images, Tensor | np.ndarray):
            raise ValueError(f"{request}, not {type(images).__name__}")
        if images.dtype not in (torch.uint8, np.uint8):
            dtype = str(images.dtype).removeprefix("torch.")
            raise ValueError(f"{request}, not {dtype}{_span(images)}")
        shape = tuple(images.shape)
        fits = len(shape) == 1 + len(self.shape) and all(
            own in (None, side) for own, side in zip(self.shape, shape[1:], strict=True)
        )
        if not fits:
            raise ValueError(f"{request}, not {shape}")
        return len(images)

    def _integers(self, images: Images, rows: slice) -> Tensor:
        """Some of the images as integers of `n_bits` bits, on the device of the flow."""
        part = images[rows]
        if isinstance(part, np.ndarray):
            part = torch.from_numpy(part.copy())  # also of a file that is mapped to be read only
        return part.to(self.device) >> (8 - cast(int, self.n_bits))

    def _n_classes(self) -> int | None:
        """The number of classes; None without. ValueError: the flow is conditioned on images."""
        if self.flow.conditioned_on is not None and self.flow.n_classes is None:
            raise ValueError(
                f"this {type(self.flow).__name__} is conditioned on images: use model.flow, or "
                "python -m reproduce.upscale"
            )
        return self.flow.n_classes

    def _classes(self, labels: Labels, n: int) -> Tensor | None:
        """The classes of n images, (n,) int64; None without classes.

        ValueError: the labels do not fit the flow or the images.
        """
        n_classes = self._n_classes()
        name = type(self.flow).__name__
        if n_classes is None:
            if labels is not None:
                raise ValueError(f"this {name} has no classes: leave the labels out")
            return None
        numbers = f"{n} whole numbers from 0 to {n_classes - 1}"
        request = f"this {name} is class-conditional: give labels, {numbers}"
        if labels is None:
            raise ValueError(request)
        if isinstance(labels, np.ndarray) and labels.dtype.kind == "U":
            labels = labels.tolist()
        if isinstance(labels, list | tuple) and all(isinstance(each, str) for each in labels):
            labels = [self.label_of(str(each)) for each in labels]
        try:
            classes = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{request}, or names, all of one kind") from error
        is_whole = not classes.is_floating_point() and classes.dtype != torch.bool
        if tuple(classes.shape) != (n,) or (n and not is_whole):
            dtype = str(classes.dtype).removeprefix("torch.")
            raise ValueError(f"{request}, not {tuple(classes.shape)} {dtype}")
        classes = classes.long().cpu()
        if n and not 0 <= int(classes.min()) <= int(classes.max()) < n_classes:
            raise ValueError(f"{request}, not {classes.min()} to {classes.max()}")
        return classes

    def _classes_of_samples(self, n: int, label: int | str | None, first: int) -> Tensor | None:
        """The classes of n samples, (n,) int64; None without classes.

        ValueError: there is no such class.
        """
        n_classes = self._n_classes()
        if label is not None:
            return torch.full((n,), self.label_of(label))
        if n_classes is None:
            return None
        return (first + torch.arange(n)) % n_classes

    def _context(self, classes: Tensor | None, rows: slice) -> Tensor | None:
        """Some rows of the classes, on the device of the flow."""
        if classes is None:
            return None
        return classes[rows].to(self.device)


def make_objective(stored: Stored, data: Data, config: DictConfig) -> Objective:
    """A new objective with stored weights, of any kind: a flow's likelihood, a regression.

    data: a datamodule, or `RecordedData`. config: the recipe.

    ConfigError, one line: the weights do not fit the model of the recipe or of the data.
    """
    experiment = stored.origin["experiment"]
    commit = stored.origin["commit"]
    script = _script(stored)
    try:
        model = script.make_flow(config, tuple(data.shape))
        objective: Objective = script.make_module(config, model, data)
    except UNFIT_RECIPE as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{stored.path} has a recipe of which {experiment} makes no model here "
            f"({reason}); use its commit {commit}"
        ) from error
    expected = {
        key: value for key, value in objective.state_dict().items() if key.startswith(PARTS)
    }
    problem = mismatch(stored.weights, expected)
    if problem:
        raise ConfigError(f"{stored.path} {problem}; use its commit {commit}")
    objective.load_state_dict(stored.weights, strict=False)
    return objective


def _script(stored: Stored) -> ModuleType:
    """The script of an experiment. ConfigError: it trains no flow, or there is no such script."""
    experiment = stored.origin["experiment"]
    name = f"reproduce.{experiment}"
    try:
        script = import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ConfigError(
            f"{stored.path} is of {experiment}, which has no script here: "
            f"use its commit {stored.origin['commit']}"
        ) from error
    missing = [part for part in ("make_flow", "make_module") if not hasattr(script, part)]
    if missing:
        raise ConfigError(
            f"{stored.path} is of {experiment}, which trains no flow: its script has no "
            f"{' and no '.join(missing)}"
        )
    return script


def _span(images: Images) -> str:
    """The range of some images for a message, ` from 0 to 1`; empty where there is none."""
    values = np.asarray(images.cpu()) if isinstance(images, Tensor) else images
    if not values.size or values.dtype.kind not in "biuf":
        return ""
    return f" from {values.min():g} to {values.max():g}"


def _batches(n: int, batch_size: int) -> Iterator[slice]:
    """The slices of n rows in batches. ValueError: the batch size is not at least 1."""
    _check_at_least("batch_size", batch_size, 1)
    for start in range(0, n, batch_size):
        yield slice(start, min(start + batch_size, n))


def _check_at_least(name: str, value: object, least: int) -> None:
    """ValueError: a value is no whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name}={value!r}: give a whole number of at least {least}")
