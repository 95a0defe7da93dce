"""What surrounds the convolutions of a conditioner, and their gradients, in fewer passes over memory.

Gradients can be differentiated again; the transforms of torch.func cannot take these functions apart.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def conv3x3(x: Tensor, weight: Tensor, known: Tensor | None = None) -> Tensor:
    """A "same" convolution without bias: x (B, C_in, H, W), weight (C_out, C_in, 3, 3).

    known: what it gave before, where only its gradients are wanted now.
    """
    narrow = weight.shape[0] < weight.shape[1]
    if _for_tensor_cores(x):
        return scattered(x, weight) if narrow else gathered(x, weight)
    by_patches = narrow and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    if known is not None:
        return Conv3x3.apply(x.to(known.dtype), weight.to(known.dtype), by_patches, known)
    return Conv3x3.apply(x, weight, by_patches, None) if by_patches else F.conv2d(x, weight, padding=1)


def _for_tensor_cores(x: Tensor) -> bool:
    """Whether to use matrix products, which should fill tensor cores better than cuDNN's convolutions of 6 channels.

    Those took a third of a step of Glow on an H200; the products have run there, but were not timed.
    Compiled only: what surrounds a product is then one kernel.
    """
    device = x.device.type
    return device == "cuda" and torch.is_autocast_enabled(device) and torch.compiler.is_compiling()


def gathered(x: Tensor, weight: Tensor) -> Tensor:
    """`conv3x3` for few channels in, as a matrix product with the 3x3 patches of x.

    Channels are filled up to a multiple of 8 with zeros: rows are aligned then.
    """
    height, width = x.shape[2:]
    fill = -x.shape[1] % 8
    padded = F.pad(x.movedim(1, -1), (0, fill, 1, 1, 1, 1))
    patches = torch.cat([padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], dim=-1)
    weight = F.pad(weight.permute(0, 2, 3, 1), (0, fill)).flatten(1)
    return F.linear(patches, weight).movedim(-1, 1)


def scattered(x: Tensor, weight: Tensor) -> Tensor:
    """`conv3x3` for few channels out: a matrix product with the weights of all nine places, summed where they fall.

    Sums are float32 or better. Rows of weights are filled up to a multiple of 8 with zeros.
    """
    height, width = x.shape[2:]
    c_out = len(weight)
    rows = F.pad(weight.permute(2, 3, 0, 1).flatten(0, 2), (0, 0, 0, -9 * c_out % 8))
    products = F.linear(x.movedim(1, -1), rows)[..., : 9 * c_out].unflatten(-1, (3, 3, c_out))
    padded = F.pad(products, (0, 0, 0, 0, 0, 0, 1, 1, 1, 1))
    places = [padded[:, i : i + height, j : j + width, i, j] for i in range(3) for j in range(3)]
    total = torch.promote_types(products.dtype, torch.float32)
    return sum(place.to(total) for place in places).movedim(-1, 1)


class Conv3x3(torch.autograd.Function):
    """`conv3x3`, or what it is known to give, with its gradients.

    by_patches: few channels out of many, whose gradients are both products with the 3x3 patches of the few: on a CPU in
    float32 a third faster than oneDNN's at Glow's sizes.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, by_patches: bool, known: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.by_patches = by_patches
        return F.conv2d(x, weight, padding=1) if known is None else known.view_as(known)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        if ctx.by_patches:
            return *_products_with_patches(grad, x, weight), None, None
        same = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)  # stride, padding, dilation, transposed, its padding, groups
        grads = torch.ops.aten.convolution_backward(grad, x, weight, None, *same, (*ctx.needs_input_grad[:2], False))
        return *grads[:2], None, None


def _products_with_patches(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients for x and weight."""
    (n, _, height, width), (c_out, c_in) = x.shape, weight.shape[:2]
    padded = F.pad(grad.movedim(1, -1), (0, 0, 1, 1, 1, 1)).contiguous()  # (B, H + 2, W + 2, C_out)
    rows, columns, pixels, _ = padded.stride()
    patches = padded.as_strided((n, height, width, 3, 3 * c_out), (rows, columns, pixels, columns, 1))
    patches = patches.reshape(-1, 9 * c_out)
    flipped = weight.flip(2, 3).permute(2, 3, 0, 1).reshape(9 * c_out, c_in)
    with torch.autocast(grad.device.type, enabled=False):
        grad_x = (patches @ flipped).view(n, height, width, c_in).movedim(-1, 1)
        grad_weight = patches.T @ x.movedim(1, -1).reshape(-1, c_in)
    return grad_x, grad_weight.view(3, 3, c_out, c_in).permute(2, 3, 0, 1).flip(2, 3)


def add_relu(y: Tensor, bias: Tensor) -> Tensor:
    """ReLU(y + bias), in the memory of y: y (B, C, H, W) and bias (C, H, W) or (C, 1, 1); y (N, C) and bias (C,)."""
    bias = bias.to(y.dtype)
    return (y + bias).relu() if torch.compiler.is_compiling() else AddReLU.apply(y, bias)


class AddReLU(torch.autograd.Function):
    """A sum over the batch of channels_last gradients is ten times faster in rows than as autograd writes it."""

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor) -> Tensor:
        y.add_(bias).relu_()
        ctx.mark_dirty(y)
        ctx.save_for_backward(y)
        ctx.shape = bias.shape
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        (y,) = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        if grad.dim() == 2:
            return grad, grad.sum(0)
        pixels = grad.movedim(1, -1)  # (B, H, W, C)
        if ctx.shape[-1] == 1 < grad.shape[-1]:
            return grad, pixels.flatten(0, 2).sum(0).view(ctx.shape)
        return grad, pixels.flatten(1).sum(0).view(pixels.shape[1:]).movedim(-1, 0).sum_to_size(ctx.shape)
