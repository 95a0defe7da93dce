"""What a conditional flow depends on beside its input: a class, an image."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Classes:
    """The context is a class: (B,) int64, from 0 to n_classes - 1."""

    n_classes: int

    def check(self, context: Any, model: str) -> None:
        """ValueError, one line, where `context` holds no classes. model: the name of the flow's class."""
        request = f"this {model} is class-conditional: give the classes as context, (B,) int64"
        if not isinstance(context, Tensor):
            raise ValueError(f"{request}, not {type(context).__name__}")
        if context.dim() != 1 or context.dtype != torch.int64:
            raise ValueError(f"{request}, not {tuple(context.shape)} {context.dtype}")
        # On a GPU the values are not looked at: that would wait for the device in every step.
        if context.device.type == "cpu" and not torch.compiler.is_compiling() and len(context):
            low, high = context.min(), context.max()
            if low < 0 or high >= self.n_classes:
                raise ValueError(f"{request}, from 0 to {self.n_classes - 1}, not {low} to {high}")

    def examples(self, n: int, device: torch.device) -> Tensor:
        """n contexts for pictures: the classes in turn, (n,)."""
        return torch.arange(n, device=device) % self.n_classes

    def __post_init__(self) -> None:
        if self.n_classes < 1:
            raise ValueError(f"flow.n_classes={self.n_classes} are no classes: give at least 1")


@dataclass(frozen=True)
class Images:
    """The context is an image of any size, (B, channels, height, width), in [0, 1]."""

    channels: int

    def check(self, context: Any, model: str) -> None:
        """ValueError, one line, where `context` holds no such images. model: the name of the flow's class."""
        request = (
            f"this {model} is conditioned on images: give (B, {self.channels}, H, W) as context"
        )
        if not isinstance(context, Tensor):
            raise ValueError(f"{request}, not {type(context).__name__}")
        if (
            context.dim() != 4
            or context.shape[1] != self.channels
            or not context.is_floating_point()
        ):
            raise ValueError(
                f"{request}, floating point, not {tuple(context.shape)} {context.dtype}"
            )

    def examples(self, n: int, device: torch.device) -> None:
        """None: images cannot be made up, so pictures take those of the validation data."""


ContextKind = Classes | Images


@dataclass(frozen=True)
class Encoded:
    """A context as the layers of a flow take it, made once by `FlowModel.encode_context`.

    value: a tensor, or a tuple of them, one a level; the first dimension of each is that of the rows.
    """

    value: Tensor | tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.value[0] if isinstance(self.value, tuple) else self.value)

    def repeated(self, n: int) -> "Encoded":
        """All rows n times over: B rows become n * B."""
        return Encoded(repeated(self.value, n))


def repeated(value: Tensor | tuple[Tensor, ...], n: int) -> Tensor | tuple[Tensor, ...]:
    """All rows n times over, of a tensor or of each tensor of a tuple: B rows become n * B."""
    if isinstance(value, tuple):
        return tuple(repeated(part, n) for part in value)
    return value.repeat(n, *[1] * (value.dim() - 1))
