"""Files with the keys of SRFlow's released checkpoints, at a small size, and what they compute.

Nothing here uses our flow: the reference is written from the layout of the release alone.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]
SCALE_FLOOR = 1e-4


def released(
    scale=4,
    n_levels=3,
    depth=2,
    transition_depth=2,
    hidden=5,
    blocks=3,
    channels=4,
    growth=3,
    n_stacked=2,
    seed=0,
) -> Weights:
    """Random tensors by the keys of a released file, with the parts that a flow does not use."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}

    def put(key: str, *shape: int, std: float = 0.3) -> None:
        weights[key] = std * torch.randn(*shape, generator=generator)

    def conv(key: str, c_out: int, c_in: int, std: float = 0.3) -> None:
        put(f"{key}.weight", c_out, c_in, 3, 3, std=std / math.sqrt(c_in))
        put(f"{key}.bias", c_out)

    def norm(key: str, n: int) -> None:
        put(f"{key}.bias", 1, n, 1, 1, std=0.1)
        put(f"{key}.logs", 1, n, 1, 1, std=0.1)

    def last(key: str, c_out: int, c_in: int) -> None:
        put(f"{key}.weight", c_out, c_in, 3, 3, std=0.05)
        put(f"{key}.bias", c_out, std=0.05)
        put(f"{key}.logs", c_out, 1, 1, std=0.05)

    def network(key: str, c_in: int, c_out: int) -> None:
        put(f"{key}.0.weight", hidden, c_in, 3, 3, std=0.2)
        norm(f"{key}.0.actnorm", hidden)
        put(f"{key}.2.weight", hidden, hidden, 1, 1)
        norm(f"{key}.2.actnorm", hidden)
        last(f"{key}.4", c_out, hidden)

    conv("RRDB.conv_first", channels, 3)
    for block in range(blocks):
        for dense in (1, 2, 3):
            for k in range(1, 6):
                c_out = channels if k == 5 else growth
                name = f"RRDB.RRDB_trunk.{block}.RDB{dense}.conv{k}"
                conv(name, c_out, channels + (k - 1) * growth)
    conv("RRDB.trunk_conv", channels, channels)
    for k in range(1, int(math.log2(scale)) + 1):
        conv(f"RRDB.upconv{k}", channels, channels)
    conv("RRDB.HRconv", channels, channels)
    conv("RRDB.conv_last", 3, channels)
    n_features = channels * (1 + n_stacked)
    number = 0
    size = 3
    for level in range(1, n_levels + 1):
        number += 1  # the squeeze
        size *= 4
        for step in range(transition_depth + depth):
            key = f"flowUpsamplerNet.layers.{number}"
            number += 1
            norm(f"{key}.actnorm", size)
            rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
            weights[f"{key}.invconv.weight"] = rotation
            if step >= transition_depth:
                network(f"{key}.affine.fAffine", size // 2 + n_features, size)
                network(f"{key}.affine.fFeatures", n_features, 2 * size)
        if level < n_levels - 1:
            last(f"flowUpsamplerNet.layers.{number}.conv", size, size // 2)
            number += 1
            size //= 2
    conv("flowUpsamplerNet.f.0", 96, n_features)
    return weights


def of_rrdb(weights: Weights) -> Weights:
    """The tensors of an encoder that was trained alone, by the keys of such a file."""
    return {
        key.removeprefix("RRDB."): value
        for key, value in weights.items()
        if key.startswith("RRDB.")
    }


def reference_of_rrdb(weights: Weights, low_res: Tensor) -> Tensor:
    """The image that a released RRDB makes, in float64. weights: those of a flow's file."""
    w = {key: value.double() for key, value in weights.items()}
    *_, base, _ = _features(w, low_res.double(), ())
    h = base
    n_ups = sum(key.startswith("RRDB.upconv") and key.endswith("weight") for key in w)
    for name in [*(f"upconv{k}" for k in range(1, n_ups + 1)), "HRconv"]:
        if name.startswith("upconv"):
            h = F.interpolate(h, scale_factor=2)
        h = F.conv2d(h, w[f"RRDB.{name}.weight"], w[f"RRDB.{name}.bias"], padding=1)
        h = F.leaky_relu(h, 0.2)
    return F.conv2d(h, w["RRDB.conv_last.weight"], w["RRDB.conv_last.bias"], padding=1)


def reference(
    weights: Weights, x: Tensor, low_res: Tensor, stacked: tuple[int, ...]
) -> tuple[list[Tensor], Tensor]:
    """The latents and the log-determinant of a released flow, in float64."""
    w = {key: value.double() for key, value in weights.items()}
    features = _features(w, low_res.double(), stacked)
    x = x.double()
    total = x.new_zeros(len(x))
    latents = []
    last = max(int(key.split(".")[2]) for key in w if "layers" in key)
    for number in range(last + 1):
        key = f"flowUpsamplerNet.layers.{number}"
        if f"{key}.conv.weight" in w:
            x, z = x.chunk(2, 1)
            h = _last(w, f"{key}.conv", x)
            latents.append((z - h[:, 0::2]) * torch.exp(-h[:, 1::2]))
            total = total - h[:, 1::2].sum((1, 2, 3))
            continue
        if f"{key}.actnorm.bias" not in w:  # a squeeze
            b, c, height, width = x.shape
            x = x.view(b, c, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
            x = x.reshape(b, 4 * c, height // 2, width // 2)
            continue
        pixels = x.shape[2] * x.shape[3]
        x = (x + w[f"{key}.actnorm.bias"]) * torch.exp(w[f"{key}.actnorm.logs"])
        x = F.conv2d(x, w[f"{key}.invconv.weight"][:, :, None, None])
        matrix = torch.linalg.slogdet(w[f"{key}.invconv.weight"]).logabsdet
        total = total + pixels * (w[f"{key}.actnorm.logs"].sum() + matrix)
        if f"{key}.affine.fAffine.0.weight" not in w:
            continue
        u = next(f for f in features if f.shape[-1] == x.shape[-1])
        h = _network(w, f"{key}.affine.fFeatures", u)
        scale = torch.sigmoid(h[:, 1::2] + 2) + SCALE_FLOOR
        x = (x + h[:, 0::2]) * scale
        total = total + scale.log().sum((1, 2, 3))
        kept, changed = x.chunk(2, 1)
        h = _network(w, f"{key}.affine.fAffine", torch.cat([kept, u], 1))
        scale = torch.sigmoid(h[:, 1::2] + 2) + SCALE_FLOOR
        x = torch.cat([kept, (changed + h[:, 0::2]) * scale], 1)
        total = total + scale.log().sum((1, 2, 3))
    return [*latents, x], total


def _network(w: Weights, key: str, x: Tensor) -> Tensor:
    for number, padding in ((0, 1), (2, 0)):
        name = f"{key}.{number}"
        x = F.conv2d(x, w[f"{name}.weight"], padding=padding) + w[f"{name}.actnorm.bias"]
        x = torch.relu(x * torch.exp(w[f"{name}.actnorm.logs"]))
    return _last(w, f"{key}.4", x)


def _last(w: Weights, key: str, x: Tensor) -> Tensor:
    h = F.conv2d(x, w[f"{key}.weight"], w[f"{key}.bias"], padding=1)
    return h * torch.exp(3 * w[f"{key}.logs"])


def _features(w: Weights, low_res: Tensor, stacked: tuple[int, ...]) -> list[Tensor]:
    """The features of each level, the largest first."""

    def conv(key: str, x: Tensor) -> Tensor:
        return F.conv2d(x, w[f"{key}.weight"], w[f"{key}.bias"], padding=1)

    first = conv("RRDB.conv_first", low_res)
    h = first
    outputs = []
    for block in range(1 + max(int(key.split(".")[2]) for key in w if "trunk." in key)):
        before = h
        for dense in (1, 2, 3):
            parts = [h]
            for k in range(1, 6):
                name = f"RRDB.RRDB_trunk.{block}.RDB{dense}.conv{k}"
                new = conv(name, torch.cat(parts, 1))
                parts.append(F.leaky_relu(new, 0.2))
            h = h + 0.2 * new
        h = before + 0.2 * h
        if block in stacked:
            outputs.append(h)
    base = first + conv("RRDB.trunk_conv", h)
    n_ups = sum(key.startswith("RRDB.upconv") and key.endswith("weight") for key in w)
    maps = [base]
    for k in range(1, n_ups):
        inputs = maps[0] if k == 1 else F.leaky_relu(maps[0], 0.2)
        maps.insert(0, conv(f"RRDB.upconv{k}", F.interpolate(inputs, scale_factor=2)))
    maps.append(F.interpolate(base, scale_factor=0.5, mode="bilinear"))
    return [
        torch.cat([own, *(F.interpolate(out, size=own.shape[-2:]) for out in outputs)], 1)
        for own in maps
    ]
