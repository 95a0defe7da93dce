"""The contract that every layer and every model keeps.

Which parts of torch work on a flow in eval mode (tests/test_interoperability.py):

* torch.func (vmap, grad, jvp, jacrev, hessian, functional_call, ...), forward-mode AD and batched
  gradients can be applied to `forward`, `inverse` and `log_prob`. A function that vmap maps over
  single data calls the flow on a batch of one, `x[None]`. Exceptions: `sample`, which draws random
  numbers, and a model that calls autograd itself (`FlowModel.needs_autograd`).
* `FlowModel.compile` compiles the networks. torch.export.export works; the exported graph takes
  only the sizes of its example input. So does torch.jit.trace, which torch has deprecated and which
  has to be called under torch.no_grad().
* A flow built under `torch.device("meta")` has no memory. `to_empty(device=...)` allocates it, and
  `load_state_dict` fills it. In such a flow give masks as lists of values, or as tensors on another
  device: a tensor on the meta device has no values.
* safetensors.torch.save_model(flow, path) and load_model(flow, path) save and load the weights.
  `save_file` takes only contiguous tensors, whereas convolutions keep their weights channels_last:
  `save_file({name: tensor.contiguous() for name, tensor in flow.state_dict().items()}, path)`.
"""

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from flows.bases import Base, StandardNormal
from flows.checks import check_count, check_temperature
from flows.context import Classes, Context, ContextKind, Encoded, Encoding
from flows.transforms import in_trace

Latent = TypeVar("Latent", Tensor, tuple[Tensor, ...])


class Bijection(nn.Module, ABC, Generic[Latent]):
    """An invertible map z = f(x) with its log|det df/dx|: what `Flow` and `FlowModel` share.

    `log_det` has shape (B,): one number for each datum, in nats, at least float32.
    """

    @abstractmethod
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Latent, Tensor]:
        """Map data to latents: z = f(x) and log|det df/dx|, (B,)."""

    @abstractmethod
    def inverse(self, z: Latent, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map latents to data: x = f^-1(z) and log|det df^-1/dz|, (B,).

        The log-determinant is minus that of `forward` at x.
        """


class Flow(Bijection[Tensor]):
    """A layer: a bijection from a tensor (B, ...) to a tensor of the same number of elements.

    `context` is what a conditional flow depends on, as `FlowModel.encode_context` encodes it. A
    layer that holds other layers, or a network, passes the context on to all of them. A layer that
    needs no context ignores it.

    awaits_data: whether `initialize` has to set parameters of this layer itself, and has not done
        so yet. It is a bool of Python, since reading a tensor would make the host wait for a GPU.
    """

    awaits_data: bool = False

    def initialize(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Set the parameters that depend on data (`ActNorm`) from a first batch; return f(x).

        They are set once: a second call changes nothing. A layer that holds others initialises them
        in the order of `forward`. Raises ValueError: the batch does not determine them.
        """
        z, _ = self(x, context)
        return z


class Compose(Flow):
    """f = f_n o ... o f_1; the log-determinants add up (Dinh et al. 2017, section 3.5).

    >>> from flows.elementwise import Logit
    >>> from flows.reshape import Squeeze
    >>> flow = Compose([Logit(), Squeeze()])
    >>> x = torch.rand(5, 3, 4, 4)
    >>> z, log_det = flow(x)
    >>> z.shape, log_det.shape
    (torch.Size([5, 12, 2, 2]), torch.Size([5]))
    >>> torch.allclose(flow.inverse(z)[0], x, atol=1e-5)
    True
    """

    layers: Sequence[Flow]

    def __init__(self, layers: Iterable[Flow]) -> None:
        super().__init__()
        self.layers = module_list(layers)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = no_log_det(x)
        for layer in self.layers:
            x, log_det = layer(x, context)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = no_log_det(z)
        for layer in reversed(self.layers):
            z, log_det = layer.inverse(z, context)
            total = total + log_det
        return z, total

    def initialize(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer.initialize(x, context)
        return x


class Inverted(Flow):
    """The inverse of a flow: `forward` is the `inverse` of the wrapped flow, and vice versa.

    >>> from flows.reshape import Squeeze
    >>> x, _ = Inverted(Squeeze())(torch.zeros(1, 4, 1, 1))
    >>> x.shape
    torch.Size([1, 1, 2, 2])
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.flow.inverse(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.flow(z, context)


class UninitializedWarning(UserWarning):
    """A model is trained although `FlowModel.initialize` was not called."""


class FlowModel(Bijection[tuple[Tensor, ...]]):
    """A whole model: a bijection from data of `shape` to latents, and the latents' distribution.

    It differs from a layer in two ways. Its latents are a tuple with one tensor for each level,
    even if there is only one level. And it takes the raw context (labels, a low-resolution image),
    which `context_encoder` encodes once in each call for all layers.

    >>> from flows.realnvp import RealNVP2d
    >>> flow = RealNVP2d(hidden_channels=8).eval()
    >>> flow.log_prob(torch.zeros(4, 2)).shape  # nats
    torch.Size([4])
    >>> flow.sample(3, temperature=0.7).shape
    torch.Size([3, 2])

    A subclass sets `shape`, and those of the other attributes whose defaults do not fit it:

    shape: the shape of one datum. An entry of None, as in (3, None, None), allows any size that the
        model can halve as often as it needs to.
    unit_interval: whether the data lie in [0, 1], as images do; `initialize` refuses others.
    base: the distribution of the latents.
    conditioned_on: the kind of context (`Classes`, `Images`); None if the model takes none.
    context_encoder: a module that maps a raw context to what the layers take: a tensor, or a tuple
        with one tensor for each level. Their first dimension is the batch, as in the raw context.
        None: the layers take the raw context.
    noise_shape: None if the log-determinant is exact. Otherwise it is an estimate (FFJORD, Residual
        Flow), computed from noise that is uniform in [0, 1), and this is the shape of the noise of
        one datum. `forward`, `inverse` and `log_prob` then take `noise`, (B, *noise_shape), after
        the context. `sample` calls `inverse` without noise, since it needs no log-determinant.
    needs_autograd: whether evaluation calls autograd too, as some estimates do. Such a model cannot
        be evaluated in inference mode.
    """

    shape: tuple[int | None, ...]
    unit_interval: bool = False
    base: Base = StandardNormal()
    conditioned_on: ContextKind | None = None
    context_encoder: nn.Module | None  # set by __init__: a class attribute would hide the module
    noise_shape: tuple[int, ...] | None = None
    needs_autograd: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.context_encoder = None
        self._was_trained = False  # whether `check_data` has seen the first training step

    @abstractmethod
    def forward(self, x: Tensor, context: Context = None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Map x, (B, *shape), to latents, a tuple of (B, *latent_shape), and log_det, (B,) nats.

        A model calls `self.check_data(x)` first, and passes `self.encoded(context, len(x))`, not
        the raw context, to its layers.
        """

    @abstractmethod
    def inverse(self, z: tuple[Tensor, ...], context: Context = None) -> tuple[Tensor, Tensor]:
        """Map latents to x, (B, *shape), and the log_det of the inverse, (B,) nats.

        A model calls `self.check_latents(z)` first, and passes `self.encoded(context, len(z[0]))`
        to its layers.
        """

    @abstractmethod
    def latent_shapes(self, shape: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], ...]:
        """The shape of the latents of each level, for data of `shape` (None: the model's own).

        Raises ValueError: the shape does not fit the model.
        """

    @property
    def n_classes(self) -> int | None:
        """The number of classes of a class-conditional model, else None."""
        kind = self.conditioned_on
        return kind.n_classes if isinstance(kind, Classes) else None

    def log_prob(self, x: Tensor, context: Context = None, noise: Tensor | None = None) -> Tensor:
        """log p(x) = log p(z) + log|det dz/dx|, nats, (B,) (Dinh et al. 2017, section 3.1).

        noise: (B, *noise_shape), for a model whose log-determinant is an estimate.

        Raises ValueError: x has another shape or dtype than the model; the context does not fit the
        model or the data; the noise is missing, or the model takes none. The values of x are not
        checked: an image of 0 .. 255 has a likelihood, too, which says nothing.

        >>> from flows.realnvp import RealNVP
        >>> flow = RealNVP((3, 8, 8), n_scales=2, hidden_channels=4, n_blocks=1).eval()
        >>> flow.log_prob(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2])
        >>> flow.log_prob(torch.rand(2, 3, 8, 9))
        Traceback (most recent call last):
            ...
        ValueError: RealNVP was built for data of shape (3, 8, 8), not (3, 8, 9)
        """
        self.check_data(x)
        self.check_noise(noise, len(x))
        encoding = self.encode_context(context)
        check_rows(encoding, len(x))
        if noise is None:
            latents, log_det = self(x, encoding)
        else:
            latents, log_det = self(x, encoding, noise)
        return self.base.log_prob(latents) + log_det

    def encode_context(self, context: Context) -> Encoded | None:
        """Encode a context once, to be passed to several calls of the model.

        Raises ValueError: the context is not what the model is conditioned on.
        """
        if self.conditioned_on is None:
            if context is not None:
                raise ValueError(
                    f"this {type(self).__name__} is not conditioned on anything: "
                    "leave the context out"
                )
            return None
        if isinstance(context, Encoded):
            return context
        self.conditioned_on.check(context, type(self).__name__)
        if self.context_encoder is None:
            return Encoded(cast(Tensor, context))
        return Encoded(self.context_encoder(context))

    def encoded(self, context: Context, n: int | None = None) -> Encoding | None:
        """The context as the layers take it. An `Encoded` context is not encoded again.

        n: the number of data, for which the context has to have n rows; None: any number.
        Raises ValueError: the context does not fit the model or the data.
        """
        encoding = self.encode_context(context)
        if n is not None:
            check_rows(encoding, n)
        return None if encoding is None else encoding.value

    def compile(self, *args: object, **kwargs: object) -> None:
        """Apply torch.compile to each conditioner; compiling the whole flow would take minutes.

        All conditioners run the same code, and those of one shape share their compiled graphs.
        torch makes one graph for each shape of a conditioner, each batch size and each mode
        (training or eval). After 8 graphs it would stop compiling and only log a line, so that
        limit is raised. Sizes are constants of a graph (dynamic=False), because tensors that depend
        only on sizes are constants too (flows/constants.py).
        """
        kwargs.setdefault("dynamic", False)
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(64, limit)
        for layer in self.modules():
            conditioner = getattr(layer, "conditioner", None)
            if conditioner is not None:
                conditioner.compile(*args, **kwargs)
            if hasattr(layer, "by_hand"):
                # Otherwise the layer would not call its conditioners, which are now compiled.
                cast(_WrittenByHand, layer).by_hand = False

    def check_data(self, x: Tensor) -> None:
        """Refuse x that is not (B, *shape) of the weights' dtype; warn of training without a start.

        The dtype of the weights is looked up, and the warning given, in the first training step
        only. Nothing here reads values, which would make the host wait for a GPU; a graph that is
        being recorded is left alone.

        Raises ValueError. Warns, once: UninitializedWarning.
        """
        if in_trace():
            return
        self._check_dtype("data", x)
        self.check_shape(x)
        if not self.training or not torch.is_grad_enabled() or self._was_trained:
            return
        self._was_trained = True
        if any(getattr(layer, "awaits_data", False) for layer in self.modules()):
            warnings.warn(
                f"this {type(self).__name__} is trained without a start from data: call "
                "flow.initialize(x) once, with a first batch, before the first step",
                UninitializedWarning,
                stacklevel=3,
            )

    def check_latents(self, z: tuple[Tensor, ...]) -> None:
        """Refuse latents that are not one tensor (B, *latent_shape) for each level.

        Raises ValueError.
        """
        if in_trace():
            return
        name = type(self).__name__
        shapes = self.latent_shapes(self.shape)  # type: ignore[arg-type]  # None: any size
        levels = f"{len(shapes)} tensor" + "s" * (len(shapes) > 1)
        request = f"{name} takes a tuple of {levels} as latents, one for each level"
        if not isinstance(z, Sequence):
            raise ValueError(f"{request}, not one {type(z).__name__}")
        if len(z) != len(shapes):
            raise ValueError(f"{request}, not {len(z)}")
        for level in z:
            self._check_dtype("latents", level)
        actual = tuple(tuple(level.shape[1:]) for level in z)
        if not all(map(_fits, actual, shapes)) or not self._are_of_one_size(actual):
            own_shapes = str(shapes).replace("None", "any")
            raise ValueError(f"{request}, of shapes {own_shapes}, not {actual}")
        numbers = [len(level) for level in z]
        if len(set(numbers)) > 1:
            raise ValueError(f"{request}, with as many rows at every level, not {numbers}")

    def _are_of_one_size(self, shapes: tuple[tuple[int, ...], ...]) -> bool:
        """Whether latents of these shapes are those of data of one size, in a model of any size."""
        if None not in self.shape:
            return True
        large = 2**30  # halved as often as one likes
        sides = tuple(large if side is None else side for side in self.shape)
        ratios = [
            [large // of_large * side for of_large, side in zip(of_level, shape, strict=True)][1:]
            for of_level, shape in zip(self.latent_shapes(sides), shapes, strict=True)
        ]
        return all(ratio == ratios[0] for ratio in ratios)

    def _check_dtype(self, what: str, x: Tensor) -> None:
        """Refuse what is no tensor, or of another dtype than the weights. Raises ValueError.

        what: the name of x, for the message.
        """
        name = type(self).__name__
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} takes a torch.Tensor as {what}, not {type(x).__name__}")
        if not x.is_floating_point():
            advice = ""
            if self.unit_interval and what == "data":
                advice = ": integers q of n bits become (q + u) / 2^n, with u uniform in [0, 1)"
            raise ValueError(f"{name} takes real numbers as {what}, not {x.dtype}{advice}")
        if self.training and self._was_trained:
            return
        weight = next(self.parameters(), x)
        if x.dtype != weight.dtype:
            raise ValueError(
                f"the weights of this {name} are {weight.dtype}, but the {what} {x.dtype}: "
                "convert one of them"
            )

    def check_values(self, x: Tensor) -> None:
        """Refuse data that are not finite or, for a model of data in [0, 1], lie far outside.

        A quarter on either side is left to noise. This reads values: on a GPU the host waits.

        Raises ValueError.
        """
        name = type(self).__name__
        if not x.isfinite().all():
            rows = (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            raise ValueError(
                f"{len(rows)} of {len(x)} data are not finite, the first of them at index "
                f"{rows[0]}: leave them out of what {name} is initialised from"
            )
        if not self.unit_interval or not x.numel():
            return
        low = x.min().item()
        high = x.max().item()
        if low < -0.25 or high > 1.25:
            raise ValueError(
                f"{name} takes data in [0, 1], not from {low:.4g} to {high:.4g}: "
                "integers q of n bits become (q + u) / 2^n, with u uniform in [0, 1)"
            )

    def check_shape(self, x: Tensor) -> None:
        """Refuse x that is not (B, *shape), or whose size the model cannot halve.

        Raises ValueError.
        """
        actual = tuple(x.shape[1:])
        if not _fits(actual, self.shape):
            own_shape = str(self.shape).replace("None", "any")
            raise ValueError(
                f"{type(self).__name__} was built for data of shape {own_shape}, not {actual}"
            )
        if None in self.shape:
            self.latent_shapes(actual)

    def check_noise(self, noise: Tensor | None, n: int) -> None:
        """Refuse missing noise of an estimated log-determinant, and noise for an exact one.

        n: the number of data. Raises ValueError.
        """
        name = type(self).__name__
        if self.noise_shape is None:
            if noise is not None:
                raise ValueError(f"the log-determinant of {name} is exact: leave the noise out")
            return
        request = (
            f"the log-determinant of {name} is an estimate: "
            f"give noise (B, {', '.join(map(str, self.noise_shape))}), uniform in [0, 1)"
        )
        if noise is None:
            raise ValueError(request)
        if tuple(noise.shape) != (n, *self.noise_shape):
            raise ValueError(f"{request}, for {n} data, not {tuple(noise.shape)}")

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Context = None) -> None:
        """Set the parameters that depend on data (`ActNorm`) from a first batch, (B, *shape).

        Call it once before training, with some hundred data. A second call changes nothing, and so
        does a call for a model without such parameters.

        Raises ValueError: the batch does not fit the model, its values are not finite or not in the
        model's range, or it does not determine the parameters, as a single image, or a channel
        without variance. The weights are then as before.

        >>> from flows.glow import Glow
        >>> flow = Glow((3, 8, 8), n_levels=2, depth=1, hidden_channels=4)
        >>> flow.initialize(torch.full((64, 3, 8, 8), 0.5))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: 12 of 12 channels have the same value in all of the first batch: ...
        """
        self.check_data(x)
        self.check_values(x)
        with _unchanged_after_an_error(self):
            self.initialize_layers(x, context)

    def initialize_layers(self, x: Tensor, context: Context = None) -> None:
        """Call `Flow.initialize` of the layers; a model with an `ActNorm` overrides this."""

    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        context: Context = None,
        *,
        shape: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw n samples, (n, *shape): x = f^-1(tau * eps), eps ~ base. Call it in eval mode.

        With a context of B rows, n samples are drawn for each row: (n, B, *shape). Images are not
        clipped: their values lie in about [0, 1], but may lie outside of it.

        temperature: tau, at least 0.
        shape: the shape of one sample, for a model of data of any size; None: `sample_shape`.
        Raises ValueError: the shape or the context does not fit the model, n is not a whole number
        of at least 0, or the temperature not a number of at least 0.

        >>> from flows.glow import Glow
        >>> flow = Glow((3, 8, 8), n_levels=2, depth=1, hidden_channels=4, n_classes=10).eval()
        >>> flow.sample(5, 0.7, context=torch.tensor([3, 8])).shape
        torch.Size([5, 2, 3, 8, 8])
        """
        check_count("n", n)
        check_temperature(temperature)
        like = next(self.parameters())
        encoding = self.encode_context(context)
        latent_shapes = self.latent_shapes(shape or self.sample_shape(encoding))
        if encoding is None:
            latents = self.base.sample(n, latent_shapes, temperature, generator, like)
            x, _ = self.inverse(latents)
            return x
        rows = len(encoding)
        latents = self.base.sample(n * rows, latent_shapes, temperature, generator, like)
        x, _ = self.inverse(latents, encoding.repeated(n))
        return x.unflatten(0, (n, rows))

    def sample_shape(self, encoding: Encoded | None) -> tuple[int, ...]:
        """The shape of a sample if the caller of `sample` gives none: the model's own shape.

        A model of data of any size overrides this if its context determines the shape
        (super-resolution).

        encoding: the encoded context. Raises ValueError: the model does not fix the shape.
        """
        sides = tuple(side for side in self.shape if side is not None)
        if len(sides) < len(self.shape):
            raise ValueError(
                f"this {type(self).__name__} models data of any size: "
                "give sample(..., shape=(C, H, W))"
            )
        return sides


def check_rows(encoding: Encoded | None, n: int) -> None:
    """Refuse an encoded context that has not one row for each of n data. Raises ValueError."""
    if encoding is not None and len(encoding) != n:
        raise ValueError(
            f"the context has {len(encoding)} rows for {n} data: give one row for each"
        )


def _fits(actual: tuple[int, ...], own: tuple[int | None, ...]) -> bool:
    """Whether `actual` is the shape `own`, where None allows any size."""
    if len(actual) != len(own):
        return False
    return all(fixed in (None, side) for fixed, side in zip(own, actual, strict=True))


@contextlib.contextmanager
def _unchanged_after_an_error(module: nn.Module) -> Iterator[None]:
    """Give all weights and buffers their values back if the block raises an exception."""
    tensors = [*module.parameters(), *module.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    awaiting = [layer for layer in module.modules() if getattr(layer, "awaits_data", False)]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        for layer in awaiting:
            cast(Flow, layer).awaits_data = True
        raise


class _WrittenByHand(Protocol):
    """A layer that computes the outputs of its networks itself while `by_hand` is true."""

    by_hand: bool


Layer = TypeVar("Layer", bound=nn.Module)


def module_list(modules: Iterable[Layer]) -> Sequence[Layer]:
    """An nn.ModuleList, typed so that a type checker knows the class of its modules."""
    return cast(Sequence[Layer], nn.ModuleList(modules))


def no_log_det(x: Tensor) -> Tensor:
    """The log-determinant of a volume-preserving map: zeros, (B,), at least float32."""
    return torch.zeros(
        x.shape[0], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)
    )
