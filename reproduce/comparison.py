"""A strip of images side by side, to compare enlarged images by eye."""

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

DETAIL = 384  # pixels of the longest side of what is shown of an image
GAP = 8  # white pixels between images
TITLE = 28  # pixels of the height of the titles
FONT = 16  # pixels of their height
# The colours of a map of spread, from none to the largest.
COLOURS = ((0, 0, 0), (70, 20, 110), (190, 50, 80), (250, 150, 30), (255, 255, 190))
SHOWN_SHARE = 0.995  # the share of pixels whose spread is below the brightest colour


def detail(image: Tensor, plain: Tensor, longest: int = DETAIL) -> tuple[slice, slice]:
    """The rows and columns of the part of an image that is shown.

    It is all of the image, if its sides have at most `longest` pixels, and else the part in which
    the image differs most from a plainer one, on average.

    image, plain: (3, H, W) uint8.
    """
    height = min(image.shape[1], longest)
    width = min(image.shape[2], longest)
    difference = (image.double() - plain.double()).abs().mean(0)
    sums = F.pad(difference.cumsum(0).cumsum(1), (1, 0, 1, 0))
    totals = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width]
    totals = totals + sums[:-height, :-width]
    top, left = divmod(int(totals.argmax()), totals.shape[1])
    return slice(top, top + height), slice(left, left + width)


def spread(images: Tensor) -> Tensor:
    """The standard deviation over images, (n, 3, H, W) uint8, in grey levels, (H, W).

    It is unbiased (n - 1), of each channel, and then the mean over the channels, as the metric
    `diversity`.
    """
    return images.float().std(0).mean(0)


def spread_map(values: Tensor) -> tuple[Tensor, float]:
    """A picture of a spread, (3, H, W) uint8, and the spread that has the brightest colour.

    values: (H, W), in grey levels.
    """
    top = max(1.0, float(np.quantile(values.numpy(), SHOWN_SHARE)))
    place = (values.numpy() / top).clip(0, 1) * (len(COLOURS) - 1)
    stops = np.arange(len(COLOURS))
    channels = [np.interp(place, stops, channel) for channel in zip(*COLOURS, strict=True)]
    return torch.from_numpy(np.stack(channels).round().astype(np.uint8)), top


def strip(panels: Mapping[str, Tensor]) -> Image.Image:
    """Images side by side, each below its title.

    panels: title -> (3, H, W) uint8, all of one size.
    """
    font = ImageFont.load_default(size=FONT)
    height, width = next(iter(panels.values())).shape[1:]
    texts = [round(font.getlength(title)) for title in panels]
    column = max(width, *texts) + GAP
    picture = Image.new("RGB", (column * len(panels) + GAP, height + TITLE + GAP), "white")
    draw = ImageDraw.Draw(picture)
    for number, (title, panel) in enumerate(panels.items()):
        left = GAP + number * column
        draw.text((left, TITLE // 2), title, fill="black", font=font, anchor="lm")
        picture.paste(Image.fromarray(panel.permute(1, 2, 0).numpy()), (left, TITLE))
    return picture
