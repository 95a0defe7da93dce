"""Images whose sides do not fit a model: pad them, and crop what the model returns."""

from torch import Tensor
from torch.nn import functional as F


def padded(low_res: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int]]:
    """Pad images at the bottom and on the right to sides that are multiples of `multiple`.

    They are mirrored at the border, without repeating it (authors' code, which pads to even sides).
    An image that is smaller than its padding is mirrored as often as it takes, and one of a single
    row or column repeats it.

    low_res: (B, C, h, w). Returns the padded images and (h, w). Crop a super-resolved image by
    `high_res[..., : scale * h, : scale * w]`.

    >>> import torch
    >>> images, size = padded(torch.arange(3.0).view(1, 1, 1, 3), 4)
    >>> images[0, 0], size
    (tensor([[0., 1., 2., 1.],
            [0., 1., 2., 1.],
            [0., 1., 2., 1.],
            [0., 1., 2., 1.]]), (1, 3))
    """
    height, width = low_res.shape[-2:]
    return _longer(_longer(low_res, multiple, -2), multiple, -1), (height, width)


def _longer(x: Tensor, multiple: int, dim: int) -> Tensor:
    """x with this dimension padded at its end to a multiple of `multiple`."""
    while x.shape[dim] % multiple:
        missing = -x.shape[dim] % multiple
        if x.shape[dim] == 1:
            return x.expand(*(multiple if i == dim % x.dim() else -1 for i in range(x.dim())))
        extra = min(missing, x.shape[dim] - 1)
        sides = (0, extra, 0, 0) if dim == -1 else (0, 0, 0, extra)
        x = F.pad(x, sides, mode="reflect")
    return x
