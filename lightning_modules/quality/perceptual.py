"""LPIPS: how differently a network sees two images (Zhang et al. 2018)."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.quality.extractors import published_weights, read_weights

EPSILON = 1e-10  # is added to the length of a feature vector, as in the package lpips
SHIFT = (-0.030, -0.088, -0.188)  # of R, G and B from -1 to 1: the means of ImageNet
SCALE = (0.458, 0.448, 0.450)  # and the standard deviations
CLASSIFIER = "classifier."  # how the keys of the backbone's unused part begin
LEVELS = 255  # the largest grey level


class Backbone(NamedTuple):
    """A network of torchvision whose features are compared.

    model: its name in torchvision. url, sha256: where its weights are published, and the first
    digits of the file's SHA-256. setting: the key of a recipe that names a file of weights. ends:
    the layers of `features` after which they are compared. channels: the numbers of features there.
    smallest: the fewest pixels of an image's side.
    """

    model: str
    url: str
    sha256: str
    setting: str
    ends: tuple[int, ...]
    channels: tuple[int, ...]
    smallest: int


BACKBONES: Mapping[str, Backbone] = MappingProxyType(
    {
        "alex": Backbone(
            "alexnet",
            "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            "7be5be79",
            "metrics.alexnet_weights",
            (1, 4, 7, 9, 11),
            (64, 192, 384, 256, 256),
            31,
        ),
        "vgg": Backbone(
            "vgg16",
            "https://download.pytorch.org/models/vgg16-397923af.pth",
            "397923af",
            "metrics.vgg16_weights",
            (3, 8, 15, 22, 29),
            (64, 128, 256, 512, 512),
            16,
        ),
    }
)


class Lpips:
    """The distance of two images by the features of a network, by version 0.1 of the authors.

    At five layers, features are scaled to unit length at each position. The squared differences are
    weighted by channel, with weights learned from people's judgements, and averaged over positions:

      sum over layers l of  mean over positions of  sum over channels c of  w_lc (f_lc - g_lc)^2

    The channels' weights come with torchmetrics. The weights of the backbone do not: they are those
    that torchvision publishes.

    net: "alex" or "vgg", whose values differ; papers on super-resolution mostly use the first.
    path: the file of the backbone's weights, .pth or .safetensors, with its classifier or without.
        None: torch.hub's cache, into which the published file is downloaded if it is not there.
    Raises WeightsMissing: there is no path, and no file in the cache that can be used. Raises
    ValueError: there is no such net, or the file that `path` names cannot be used.
    """

    def __init__(self, net: str = "alex", path: str | Path | None = None) -> None:
        if net not in BACKBONES:
            raise ValueError(f"LPIPS has no net={net}: give one of {', '.join(BACKBONES)}")
        self.net = net
        self.backbone = BACKBONES[net]
        self.features = features_of(self.backbone)
        expected = self.features.state_dict(prefix="features.")
        if path is None:
            weights, self.sha256 = published_weights(
                self.backbone.url, self.backbone.sha256, expected, CLASSIFIER
            )
        else:
            weights, self.sha256 = read_weights(path, expected, CLASSIFIER)
        self.features.load_state_dict(
            {key.removeprefix("features."): value for key, value in weights.items()}, assign=True
        )
        self.heads = heads_of(net)
        self.is_published = self.sha256.startswith(self.backbone.sha256)

    @property
    def protocol(self) -> dict[str, str | bool]:
        """What the figure depends on."""
        return {
            "definition": "lpips 0.1",
            "net": self.net,
            "weights_sha256": self.sha256,
            "published_weights": self.is_published,
        }

    @torch.no_grad()
    def __call__(self, image: Tensor, reference: Tensor) -> Tensor:
        """The distances of uint8 images, (B, 3, H, W), to others of the same shape: (B,) float64.

        The network follows the images to their device. Raises ValueError: they are not uint8 of one
        shape, or are too small for the network.
        """
        self._check(image, reference)
        self.features.to(image.device)
        total = torch.zeros(len(image), dtype=torch.float64, device=image.device)
        pairs = torch.cat([as_input(image), as_input(reference)])
        with torch.autocast(image.device.type, enabled=False):
            for i, layer in enumerate(self.features):
                pairs = layer(pairs)
                if i in self.backbone.ends:
                    head = self.heads[self.backbone.ends.index(i)].to(image.device)
                    total += distance(pairs, head).double()
        return total

    def _check(self, image: Tensor, reference: Tensor) -> None:
        """ValueError, one line: two batches cannot be compared."""
        for images in (image, reference):
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
                raise ValueError(
                    f"images have to be uint8 (B, 3, H, W), but are {images.dtype} "
                    f"{tuple(images.shape)}"
                )
        if image.shape != reference.shape:
            raise ValueError(
                f"images of shape {tuple(image.shape)} cannot be compared with references of shape "
                f"{tuple(reference.shape)}"
            )
        smallest = self.backbone.smallest
        if min(image.shape[2:]) < smallest:
            raise ValueError(
                f"images of {image.shape[2]} x {image.shape[3]} pixels are too small for LPIPS by "
                f"{self.backbone.model}: give at least {smallest} x {smallest}"
            )


def features_of(backbone: Backbone) -> nn.Sequential:
    """The convolutional part of a backbone in eval mode, with weights on torch's `meta` device.

    The network has no values yet, so that none is drawn from the global random generator.
    """
    from torchvision import models

    with torch.device("meta"):
        features = getattr(models, backbone.model)(weights=None).features
    layers = list(features)[: backbone.ends[-1] + 1]
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # a compared layer is not overwritten by the next one
    return nn.Sequential(*layers).eval().requires_grad_(False)


def heads_of(net: str) -> list[Tensor]:
    """The learned weights of the channels of each compared layer, (1, C, 1, 1) each."""
    from torchmetrics.functional.image import lpips

    channels = BACKBONES[net].channels
    names = [f"lin{i}.model.1.weight" for i in range(len(channels))]
    expected = {
        name: torch.empty(1, n, 1, 1, device="meta")
        for name, n in zip(names, channels, strict=True)
    }
    path = Path(lpips.__file__).with_name("lpips_models") / f"{net}.pth"
    weights, _ = read_weights(path, expected)
    return [weights[name] for name in names]


def as_input(images: Tensor) -> Tensor:
    """uint8 images as the backbones take them, (B, 3, H, W) float32."""
    shift = torch.tensor(SHIFT, device=images.device).view(1, 3, 1, 1)
    scale = torch.tensor(SCALE, device=images.device).view(1, 3, 1, 1)
    return (2 * images.float() / LEVELS - 1 - shift) / scale


def distance(pairs: Tensor, head: Tensor) -> Tensor:
    """The part of one layer in the distance, (B,).

    pairs: the features of images and, below them, of references, (2B, C, h, w). head: the weights
    of the channels, (1, C, 1, 1).
    """
    lengths = pairs.square().sum(1, keepdim=True).sqrt()
    image, reference = (pairs / (lengths + EPSILON)).chunk(2)
    return (head * (image - reference).square()).sum(1).mean((1, 2))
