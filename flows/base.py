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

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from flows.bases import Base, StandardNormal
from flows.context import Classes, Context, ContextKind, Encoded, Encoding

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
    """

    def initialize(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Set the parameters that depend on data (`ActNorm`) from a first batch; return f(x).

        They are set once: a second call changes nothing. A layer that holds others initialises them
        in the order of `forward`. Call it under `torch.no_grad()`.
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
    base: Base = StandardNormal()
    conditioned_on: ContextKind | None = None
    context_encoder: nn.Module | None  # set by __init__: a class attribute would hide the module
    noise_shape: tuple[int, ...] | None = None
    needs_autograd: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.context_encoder = None

    @abstractmethod
    def forward(self, x: Tensor, context: Context = None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Map x, (B, *shape), to latents, a tuple of (B, *latent_shape), and log_det, (B,) nats.

        A model passes `self.encoded(context)`, not the raw context, to its layers.
        """

    @abstractmethod
    def inverse(self, z: tuple[Tensor, ...], context: Context = None) -> tuple[Tensor, Tensor]:
        """Map latents to x, (B, *shape), and the log_det of the inverse, (B,) nats."""

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

        Raises ValueError: x has another shape than the model; the context does not fit the model or
        the data; the noise is missing, or the model takes none.

        >>> from flows.realnvp import RealNVP
        >>> flow = RealNVP((3, 8, 8), n_scales=2, hidden_channels=4, n_blocks=1).eval()
        >>> flow.log_prob(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2])
        >>> flow.log_prob(torch.rand(2, 3, 8, 9))
        Traceback (most recent call last):
            ...
        ValueError: RealNVP was built for data of shape (3, 8, 8), not (3, 8, 9)
        """
        self.check_shape(x)
        self.check_noise(noise)
        encoding = self.encode_context(context)
        if encoding is not None and len(encoding) != len(x):
            raise ValueError(
                f"the context has {len(encoding)} rows for {len(x)} data: give one row for each"
            )
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

    def encoded(self, context: Context) -> Encoding | None:
        """The context as the layers take it. An `Encoded` context is not encoded again."""
        encoding = self.encode_context(context)
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

    def check_shape(self, x: Tensor) -> None:
        """Refuse x that is not (B, *shape), or whose size the model cannot halve.

        Raises ValueError.
        """
        actual = tuple(x.shape[1:])
        fits = len(actual) == len(self.shape)
        fits = fits and all(
            own in (None, side) for own, side in zip(self.shape, actual, strict=True)
        )
        if not fits:
            own_shape = str(self.shape).replace("None", "any")
            raise ValueError(
                f"{type(self).__name__} was built for data of shape {own_shape}, not {actual}"
            )
        if None in self.shape:
            self.latent_shapes(actual)

    def check_noise(self, noise: Tensor | None) -> None:
        """Refuse missing noise of an estimated log-determinant, and noise for an exact one.

        Raises ValueError.
        """
        name = type(self).__name__
        if self.noise_shape is not None and noise is None:
            shape = f"(B, {', '.join(map(str, self.noise_shape))})"
            raise ValueError(
                f"the log-determinant of {name} is an estimate: "
                f"give noise {shape}, uniform in [0, 1)"
            )
        if self.noise_shape is None and noise is not None:
            raise ValueError(f"the log-determinant of {name} is exact: leave the noise out")

    def initialize(self, x: Tensor, context: Context = None) -> None:
        """Set the parameters that depend on data (`ActNorm`) from a first batch, (B, *shape).

        A model without such parameters does nothing. Call it under `torch.no_grad()`.
        """

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

        temperature: tau.
        shape: the shape of one sample, for a model of data of any size; None: `sample_shape`.
        Raises ValueError: the shape or the context does not fit the model.

        >>> from flows.glow import Glow
        >>> flow = Glow((3, 8, 8), n_levels=2, depth=1, hidden_channels=4, n_classes=10).eval()
        >>> flow.sample(5, 0.7, context=torch.tensor([3, 8])).shape
        torch.Size([5, 2, 3, 8, 8])
        """
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
