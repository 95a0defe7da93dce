"""The context of a conditional flow: what it depends on besides its input, a class or an image."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flows.checks import check_count
from flows.transforms import in_transform


@dataclass(frozen=True)
class Classes:
    """The context is a class: (B,) int64, from 0 to n_classes - 1.

    >>> Classes(3).examples(4, torch.device("cpu"))
    tensor([0, 1, 2, 0])
    >>> Classes(3).check(torch.tensor([0, 5]), "Glow")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    ValueError: this Glow is class-conditional: ... from 0 to 2, not 0 to 5
    """

    n_classes: int

    def check(self, context: object, model: str) -> None:
        """Refuse a context that holds no classes. Raises ValueError. model: the model's name."""
        request = (
            f"this {model} is class-conditional: give the classes as context, (B,) int64, "
            "for example torch.tensor([0])"
        )
        if not isinstance(context, Tensor):
            raise ValueError(f"{request}, not {type(context).__name__}")
        if context.dim() != 1 or context.dtype != torch.int64:
            raise ValueError(f"{request}, not {tuple(context.shape)} {context.dtype}")
        # On a GPU the values are not checked, since every step would wait for the device. In a
        # compiled graph and in a transform of torch.func they cannot be read.
        on_cpu = context.device.type == "cpu"
        if on_cpu and not torch.compiler.is_compiling() and not in_transform() and len(context):
            low = context.min()
            high = context.max()
            if low < 0 or high >= self.n_classes:
                raise ValueError(f"{request}, from 0 to {self.n_classes - 1}, not {low} to {high}")

    def examples(self, n: int, device: torch.device) -> Tensor:
        """n contexts for pictures: the classes in turn, (n,)."""
        return torch.arange(n, device=device) % self.n_classes

    def __post_init__(self) -> None:
        check_count("flow.n_classes", self.n_classes, least=1)


@dataclass(frozen=True)
class Images:
    """The context is an image of any size, (B, channels, height, width), in [0, 1]."""

    channels: int

    def check(self, context: object, model: str) -> None:
        """Refuse a context that holds no such images. Raises ValueError. model: its name."""
        request = (
            f"this {model} is conditioned on images: give (B, {self.channels}, H, W) as context"
        )
        if not isinstance(context, Tensor):
            raise ValueError(f"{request}, not {type(context).__name__}")
        fits = context.dim() == 4 and context.shape[1] == self.channels
        if not fits or not context.is_floating_point():
            raise ValueError(
                f"{request}, floating point, not {tuple(context.shape)} {context.dtype}"
            )

    def examples(self, n: int, device: torch.device) -> None:
        """None: images cannot be made up, so pictures use contexts from the validation data."""


ContextKind = Classes | Images

# A context as the layers take it: a tensor, or a tuple with one for each level.
Encoding = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Encoded:
    """A context as the layers of a flow take it, the result of `FlowModel.encode_context`.

    value: a tensor, or a tuple with one tensor for each level. The first dimension is the batch.

    >>> labels = Encoded(torch.tensor([4, 7]))
    >>> len(labels)
    2
    >>> labels.repeated(2).value
    tensor([4, 7, 4, 7])
    """

    value: Encoding

    def __len__(self) -> int:
        if isinstance(self.value, tuple):
            return len(self.value[0])
        return len(self.value)

    def repeated(self, n: int) -> "Encoded":
        """Repeat all B rows n times, one copy after the other: n * B rows."""
        return Encoded(repeated(self.value, n))


# What the methods of a model take: a raw context, an encoded one, or none.
Context = Tensor | Encoded | None


def repeated(value: Encoding, n: int) -> Encoding:
    """Repeat all B rows of a tensor, or of each tensor of a tuple, n times: n * B rows."""
    if isinstance(value, tuple):
        return tuple(_rows_repeated(part, n) for part in value)
    return _rows_repeated(value, n)


def _rows_repeated(value: Tensor, n: int) -> Tensor:
    return value.repeat(n, *[1] * (value.dim() - 1))
