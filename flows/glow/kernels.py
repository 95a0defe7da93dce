"""The convolutions of Glow's networks and their hand-written gradients, with few memory passes."""

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """A "same" convolution without bias: x (B, C_in, H, W), weight (C_out, C_in, 3, 3)."""
    if not _for_tensor_cores(x):
        return F.conv2d(x, weight, padding=1)
    c_out, c_in = weight.shape[:2]
    if c_out < c_in:
        return conv3x3_by_shifts(x, weight)
    return conv3x3_by_patches(x, weight)


def conv3x3_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight, from the gradient of the output of `conv3x3`.

    On a CPU, if C_out < C_in, both are matrix products with the 3x3 patches of `grad`, which at
    Glow's sizes are faster than oneDNN.
    """
    reduces = weight.shape[0] < weight.shape[1]
    if reduces and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return _gradients_by_patches(grad, x, weight)
    grad_x, grad_weight, _ = convolution_gradients(grad, x, weight, (True, True, False))
    return grad_x, grad_weight


def convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias of a 3x3 "same" convolution, by torch's own operation.

    grad: the gradient of the output. needed: which of them to compute; the others are None.
    """
    gradients = torch.ops.aten.convolution_backward.default(
        grad,
        x,
        weight,
        (len(weight),),  # sizes of the bias
        (1, 1),  # stride
        (1, 1),  # padding
        (1, 1),  # dilation
        False,  # transposed
        (0, 0),  # output padding
        1,  # groups
        needed,
    )
    return cast("tuple[Tensor, Tensor, Tensor]", gradients)


def _for_tensor_cores(x: Tensor) -> bool:
    """Whether to convolve by matrix products, which use tensor cores better.

    cuDNN's convolutions of few channels took a third of a training step of Glow on a GPU. The
    matrix products have been run on a GPU, but not timed. They are used only in compiled code,
    where the operations around a product are fused into one kernel.
    """
    device = x.device.type
    return device == "cuda" and torch.is_autocast_enabled(device) and torch.compiler.is_compiling()


def conv3x3_by_patches(x: Tensor, weight: Tensor) -> Tensor:
    """`conv3x3` for few input channels: a matrix product with the 3x3 patches of x.

    The channels are padded with zeros to a multiple of 8, so that rows are aligned in memory.
    """
    height, width = x.shape[2:]
    fill = -x.shape[1] % 8
    padded = F.pad(x.movedim(1, -1), (0, fill, 1, 1, 1, 1))
    patches = torch.cat(
        [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], dim=-1
    )
    weight = F.pad(weight.permute(0, 2, 3, 1), (0, fill)).flatten(1)
    return F.linear(patches, weight).movedim(-1, 1)


def conv3x3_by_shifts(x: Tensor, weight: Tensor) -> Tensor:
    """`conv3x3` for few output channels: one matrix product for all nine positions of the kernel.

    The nine products are shifted by their positions and summed, in float32 or better. The rows of
    the weight are padded with zeros to a multiple of 8.
    """
    height, width = x.shape[2:]
    c_out = len(weight)
    rows = F.pad(weight.permute(2, 3, 0, 1).flatten(0, 2), (0, 0, 0, -9 * c_out % 8))
    products = F.linear(x.movedim(1, -1), rows)[..., : 9 * c_out].unflatten(-1, (3, 3, c_out))
    padded = F.pad(products, (0, 0, 0, 0, 0, 0, 1, 1, 1, 1))
    terms = [padded[:, i : i + height, j : j + width, i, j] for i in range(3) for j in range(3)]
    dtype = torch.promote_types(products.dtype, torch.float32)
    total = terms[0].to(dtype)
    for term in terms[1:]:
        total = total + term.to(dtype)
    return total.movedim(-1, 1)


def _gradients_by_patches(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight as matrix products with the 3x3 patches of `grad`."""
    n, _, height, width = x.shape
    c_out, c_in = weight.shape[:2]
    padded = F.pad(grad.movedim(1, -1), (0, 0, 1, 1, 1, 1)).contiguous()  # (B, H + 2, W + 2, C_out)
    row, column, pixel, _ = padded.stride()
    patches = padded.as_strided((n, height, width, 3, 3 * c_out), (row, column, pixel, column, 1))
    patches = patches.reshape(-1, 9 * c_out)
    flipped = weight.flip(2, 3).permute(2, 3, 0, 1).reshape(9 * c_out, c_in)
    grad_x = images(patches @ flipped, x)
    grad_weight = patches.T @ pixels(x)
    return grad_x, grad_weight.view(3, 3, c_out, c_in).permute(2, 3, 0, 1).flip(2, 3)


def size_of(x: Tensor) -> tuple[int, int]:
    """(H, W) of images."""
    height, width = x.shape[-2:]
    return height, width


def pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B H W, C): a view of channels_last images."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def images(rows: Tensor, like: Tensor) -> Tensor:
    """(B H W, C) to (B, C, H, W), a channels_last view; B, H and W are those of `like`."""
    return rows.view(like.shape[0], *like.shape[2:], rows.shape[-1]).permute(0, 3, 1, 2)


def add_relu(y: Tensor, bias: Tensor | None = None) -> Tensor:
    """ReLU(y + bias); in place, in the memory of y, if no gradients are recorded."""
    if torch.is_grad_enabled():
        return (y if bias is None else y + bias).relu()
    if bias is not None:
        y.add_(bias)
    return y.relu_()


def relu_gradient(grad: Tensor, y: Tensor) -> Tensor:
    """The gradient of a ReLU's input, written into `grad`, the gradient of its output y."""
    return torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad)


def scaled(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of a weight, (C_out, ...), times scale, (C_out,), converted to `dtype`.

    If no gradients are recorded, this takes a single pass over the weight.
    """
    scale = _column(scale, weight)
    if weight.dtype == dtype or torch.is_grad_enabled():
        return (weight * scale).to(dtype)
    return torch.mul(weight, scale, out=torch.empty_like(weight, dtype=dtype))


def scaled_gradients(grad: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of weight and scale, from the gradient of the result of `scaled`."""
    return grad * _column(scale, weight), (grad * weight).sum(tuple(range(1, weight.dim())))


def _column(scale: Tensor, weight: Tensor) -> Tensor:
    """scale, (C_out,), reshaped to broadcast to weight, (C_out, ...)."""
    return scale.view(-1, *[1] * (weight.dim() - 1))
