"""The checkpoints that the authors of SRFlow released: their keys, and which of ours they are.

The names and shapes of the keys are those that messages of torch state in andreas128/SRFlow issues
14 and 18. The weights themselves are licensed CC BY-NC-SA 4.0, and none come with this repository.

A file holds one tensor for each key:

    RRDB.conv_first, .RRDB_trunk.B.RDB{1,2,3}.conv{1..5}, .trunk_conv, .upconv{1..}   (encoder)
    RRDB.HRconv, .conv_last, and the last upconv           (get no gradient in a flow: left out)
    flowUpsamplerNet.layers.I.actnorm.{bias,logs}, .invconv.weight                      (a step)
    flowUpsamplerNet.layers.I.affine.fFeatures, .fAffine   (a conditional step: its two networks)
    flowUpsamplerNet.layers.I.conv.{weight,bias,logs}                      (the prior of a split)
    flowUpsamplerNet.f                                         (a convolution that is never used)

A file of an encoder that was trained alone, RRDB_*.pth, has the keys of the first two lines without
"RRDB.", and all of them are used.

I counts the layers of all levels. A squeeze counts, but has no tensor. A network N is N.0.weight,
N.0.actnorm, N.2.weight, N.2.actnorm and N.4.{weight,bias,logs}. Its last layer has the shift in the
even channels and the raw log-scale in the odd ones, and so has a prior the mean and the log-std;
ours have the halves of the channels for them.
"""

import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from flows.base import Compose, Flow
from flows.coupling import AffineInjector, SigmoidCoupling
from flows.glow.conditioner import GlowConditioner
from flows.glow.edges import ZeroConv2d
from flows.glow.priors import SplitPrior
from flows.glow.steps import Steps
from flows.linear import InvertibleConv1x1
from flows.normalization import ActNorm
from flows.srflow import RRDB, RRDBEncoder, SRFlow
from reproduce.config import ConfigError

Weights = dict[str, Tensor]
ENCODER = "RRDB."
LAYERS = "flowUpsamplerNet.layers."
LAYER = re.compile(r"flowUpsamplerNet\.layers\.(\d+)\.(.+)")
BLOCK = re.compile(r"(?:RRDB\.)?RRDB_trunk\.(\d+)\.")
UPSAMPLING = re.compile(r"(?:RRDB\.)?upconv(\d+)\.weight")
UNUSED = re.compile(r"(RRDB\.(HRconv|conv_last|upconv\d+)|flowUpsamplerNet\.f\.\d+)\.(weight|bias)")
PARALLEL = "module."  # how keys begin that were saved from within DataParallel
STACKED = {4: (1, 8, 15, 22), 8: (1, 3, 5, 7)}  # by scale: the file does not say it
MIN_SCALE = 1e-4  # authors' code
# Keys without which these settings are not known.
NEEDED = {
    "encoder_channels": "RRDB.conv_first.weight",
    "encoder_blocks": "RRDB.RRDB_trunk.*",
    "encoder_growth": "RRDB.RRDB_trunk.0.RDB1.conv1.weight",
    "n_levels": f"{LAYERS}*.invconv.weight",
    "depth": f"{LAYERS}*.affine.*",
    "hidden_channels": f"{LAYERS}*.affine.fAffine.0.weight",
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NEEDED_OF_RRDB = {
    "channels": "conv_first.weight",
    "n_blocks": "RRDB_trunk.*",
    "growth": "RRDB_trunk.0.RDB1.conv1.weight",
}
BLOCKS_OF_CELEBA = 8  # of the encoder; those for DF2K have 23
MOST_LAYERS = 1000
SHOWN = 3  # keys that a message names
HINT = "give SRFlow_*.pth or RRDB_*.pth of SRFlow's authors, or what their code has saved"


class Part(NamedTuple):
    """Where a tensor of our flow comes from.

    tensor: ours. key: of the file. is_interleaved: whether its channels are shift and log-scale in
    turn, and have to become two halves. shape: that of the tensor in the file.
    """

    tensor: Tensor
    key: str
    is_interleaved: bool
    shape: tuple[int, ...]


class Released(NamedTuple):
    """The model of a file.

    network: an `SRFlow` or an `RRDB`, on the meta device: its weights have no values yet. kind:
    "flow" or "network", what it is called in the objective that trains it. settings: the arguments
    of the network. experiment: the recipe that trains such a network. parts: of its weights.
    """

    network: SRFlow | RRDB
    kind: str
    settings: dict[str, Any]
    experiment: str
    parts: list[Part]


# ---------------------------------------------------------------------- the file


def read_released(path: Path) -> Weights:
    """The tensors of a file by their keys, on the CPU. No code is run from the file.

    FileNotFoundError, ConfigError, one line: there is no such file, it is damaged, or holds other
    things than tensors.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: {HINT}")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: {HINT}")
    _check_archive(path)
    try:
        with warnings.catch_warnings():  # torch has some on the form of a pickle
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except UnpicklingError as error:
        if "weights_only" in str(error) and _is_pickle(path):
            raise ConfigError(
                f"{path} asks to run code when it is loaded, which is refused: {HINT}"
            ) from error
        raise ConfigError(f"{path} is no file of weights: {HINT}") from error
    except Exception as error:
        raise ConfigError(f"{path} is damaged: get it again") from error
    return _tensors(path, content)


def _is_pickle(path: Path) -> bool:
    """Whether a file begins as those of torch.save: an archive, or a pickle of a later protocol."""
    with path.open("rb") as file:
        return file.read(2)[:1] in (b"P", b"\x80")


def _check_archive(path: Path) -> None:
    """Check the sums in an archive, which torch.load does not. ConfigError, one line.

    An archive that unpacks to more than its own size is none of torch.save. Files of old versions
    of torch are no archives, and pass.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [info for info in archive.infolist() if info.compress_type]
            damaged = packed or archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as error:
        raise ConfigError(f"{path} is damaged or cut off: get it again") from error
    if damaged:
        raise ConfigError(f"{path} is damaged: get it again")


def _tensors(path: Path, content: object) -> Weights:
    """The tensors by key. ConfigError, one line: the content is something else."""
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{path} holds no tensors by their names: {HINT}")
    others = [str(key) for key, value in content.items() if not _is_weight(key, value)]
    if others:
        raise ConfigError(f"{path} holds {listed(others)}, which are no weights: {HINT}")
    weights = cast(Weights, content)
    n_bytes = sum(value.numel() * value.element_size() for value in weights.values())
    if n_bytes > path.stat().st_size:  # views that repeat a few values
        raise ConfigError(f"{path} holds more values than it has bytes for: {HINT}")
    wrong = [key for key, value in weights.items() if not value.isfinite().all()]
    if wrong:
        raise ConfigError(f"{path} holds values that are not finite, in {listed(wrong)}")
    if all(key.startswith(PARALLEL) for key in weights):
        weights = {key.removeprefix(PARALLEL): value for key, value in weights.items()}
    return weights


def _is_weight(key: object, value: object) -> bool:
    is_plain = isinstance(value, Tensor) and value.layout == torch.strided
    return isinstance(key, str) and is_plain and cast(Tensor, value).dtype in FLOATS


def listed(keys: list[str]) -> str:
    """The first of some keys, and how many more there are.

    >>> listed(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    names = ", ".join(key[:100] for key in keys[:SHOWN])
    if len(keys) > SHOWN:
        return f"{names} and {len(keys) - SHOWN} more"
    return names


# ---------------------------------------------------------------------- the model of a file


def released_model(weights: Weights, path: Path, stacked: tuple[int, ...] = ()) -> Released:
    """The model that a file is of, as far as its keys and shapes tell.

    stacked: as in `settings_of`.
    ConfigError or ValueError, one line: the file is of something else.
    """
    if any(key.startswith((ENCODER, "flowUpsamplerNet.")) for key in weights):
        settings = settings_of(weights, path, stacked)
        with torch.device("meta"):
            flow = SRFlow(**settings)
        experiment = f"srflow_{_data_of(settings['scale'], settings['encoder_blocks'])}"
        return Released(flow, "flow", settings, experiment, list(parts_of(flow)))
    if stacked:
        raise ConfigError(
            f"stacked={list(stacked)} is for a flow, and {path} has none: leave it out"
        )
    settings = settings_of_rrdb(weights, path)
    with torch.device("meta"):
        network = RRDB(**settings)
    experiment = f"rrdb_{_data_of(settings['scale'], settings['n_blocks'])}"
    return Released(network, "network", settings, experiment, list(parts_of_rrdb(network)))


def _data_of(scale: int, n_blocks: int) -> str:
    """The end of the name of the recipes for a file's data, by the sizes that were released."""
    if scale == 8 and n_blocks <= BLOCKS_OF_CELEBA:
        return "celeba_x8"
    return f"div2k_x{scale}"


def settings_of_rrdb(weights: Weights, path: Path) -> dict[str, Any]:
    """The arguments of the `RRDB` that a file is of. ConfigError: it is of something else."""
    settings = {
        "scale": 2 ** len(_numbers(UPSAMPLING, weights)),
        "n_blocks": len(_numbers(BLOCK, weights)),
        "channels": _side(weights, "conv_first.weight"),
        "growth": _side(weights, "RRDB_trunk.0.RDB1.conv1.weight"),
    }
    missing = [key for name, key in NEEDED_OF_RRDB.items() if not settings[name]]
    if missing:
        raise ConfigError(f"{path} lacks {listed(missing)}: {HINT}")
    _check_scale(settings["scale"], path)
    return settings


def _check_scale(scale: int, path: Path) -> None:
    """ConfigError: no model of this scale was released."""
    if scale not in STACKED:
        raise ConfigError(f"{path} is of a model that enlarges by {scale}, not by 4 or 8: {HINT}")


def settings_of(weights: Weights, path: Path, stacked: tuple[int, ...] = ()) -> dict[str, Any]:
    """The arguments of the `SRFlow` that a file is of, as far as its keys and shapes tell.

    stacked: the numbers of the encoder's blocks whose outputs are features; (): those that were
    released, which the file does not tell.
    ConfigError, one line: the file is of something else.
    """
    steps = _steps(weights)
    conditional = [i for i, kinds in steps.items() if "affine" in kinds]
    sizes = {i: _side(weights, f"{LAYERS}{i}.invconv.weight") for i in steps}
    networks = [f"{LAYERS}{i}.affine" for i in conditional]
    n_features = max(
        (_side(weights, f"{name}.fFeatures.0.weight", 1) for name in networks), default=0
    )
    settings: dict[str, Any] = {
        "scale": 2 ** len(_numbers(UPSAMPLING, weights)),
        "n_levels": len(set(sizes.values()) - {0}),
        "depth": _of_a_level(conditional, sizes),
        "transition_depth": _of_a_level(sorted(set(steps) - set(conditional)), sizes),
        "hidden_channels": max(
            (_side(weights, f"{name}.fAffine.0.weight") for name in networks), default=0
        ),
        "permutation": "invertible_plain",
        "injector": n_features > 0,
        "min_scale": MIN_SCALE,
        "encoder_blocks": len(_numbers(BLOCK, weights)),
        "encoder_channels": _side(weights, "RRDB.conv_first.weight"),
        "encoder_growth": _side(weights, "RRDB.RRDB_trunk.0.RDB1.conv1.weight"),
    }
    missing = [key for name, key in NEEDED.items() if not settings[name]]
    if missing:
        raise ConfigError(f"{path} lacks {listed(missing)}: {HINT}")
    _check_scale(settings["scale"], path)
    if max(steps) > MOST_LAYERS:
        raise ConfigError(f"{path} is of a flow of {max(steps)} layers: {HINT}")
    blocks = stacked or STACKED[settings["scale"]]
    channels = settings["encoder_channels"]
    if n_features and n_features != channels * (1 + len(blocks)):
        raise ConfigError(
            f"{path} is of a flow with {n_features} features of {channels} channels: give the "
            f"numbers of {n_features // channels - 1} blocks as stacked=, not {list(blocks)}"
        )
    return settings | {"stacked": list(blocks)}


def _numbers(pattern: re.Pattern[str], weights: Weights) -> set[int]:
    """The numbers in the keys that match a pattern."""
    return {int(match[1]) for match in map(pattern.match, weights) if match and len(match[1]) < 6}


def _steps(weights: Weights) -> dict[int, set[str]]:
    """The layers that are steps, by their numbers: the first words of their keys."""
    kinds: dict[int, set[str]] = {}
    for match in map(LAYER.fullmatch, weights):
        if match and len(match[1]) < 6:
            kinds.setdefault(int(match[1]), set()).add(match[2].partition(".")[0])
    return {i: names for i, names in kinds.items() if "conv" not in names}


def _side(weights: Weights, key: str, axis: int = 0) -> int:
    """The length of an axis of a tensor; 0 if there is no such tensor or axis."""
    value = weights.get(key)
    if value is None or value.dim() <= axis:
        return 0
    return value.shape[axis]


def _of_a_level(numbers: list[int], sizes: dict[int, int]) -> int:
    """How many of some steps a level has; levels differ in their channels.

    numbers: those of the steps. sizes: the channels of each step.
    """
    counts = Counter(sizes[i] for i in numbers if sizes[i]).values()
    return max(Counter(counts).items(), key=lambda item: item[::-1], default=(0, 0))[0]


# ---------------------------------------------------------------------- the weights of a model


def parts_of(flow: SRFlow) -> Iterator[Part]:
    """Where each parameter of a flow comes from. The buffers of `ActNorm` are not among them."""
    yield from _parts_of_encoder(flow.context_encoder, ENCODER)
    number = 0
    for level in flow.levels:
        for layer in cast(Compose, level).layers:
            if isinstance(layer, Steps):
                layers = list(layer.layers)
                for i in range(0, len(layers), 3):
                    yield from _parts_of_step(layers[i : i + 3], f"{LAYERS}{number}")
                    number += 1
            elif isinstance(layer, SplitPrior):
                yield from _parts_of_last(layer.net, f"{LAYERS}{number}.conv")
                number += 1
            else:  # a squeeze
                number += 1


def parts_of_rrdb(network: RRDB) -> Iterator[Part]:
    """Where each parameter of an RRDB that was trained alone comes from."""
    encoder = network.encoder
    yield from _parts_of_encoder(encoder, "")
    convs = {
        f"upconv{len(encoder.upsamplings) + 1}": network.upsampling,
        "HRconv": network.conv_hidden,
        "conv_last": network.conv_out,
    }
    for name, conv in convs.items():
        yield from _parts_of_conv(conv, name)


def _parts_of_encoder(encoder: RRDBEncoder, prefix: str) -> Iterator[Part]:
    convs = {"conv_first": encoder.conv_in, "trunk_conv": encoder.conv_trunk}
    for i, block in enumerate(encoder.blocks):
        for j, dense in enumerate(block.blocks, start=1):
            for k, conv in enumerate(dense.convs, start=1):
                convs[f"RRDB_trunk.{i}.RDB{j}.conv{k}"] = conv
    for i, conv in enumerate(encoder.upsamplings, start=1):
        convs[f"upconv{i}"] = conv
    for name, conv in convs.items():
        yield from _parts_of_conv(conv, f"{prefix}{name}")


def _parts_of_conv(conv: nn.Conv2d, key: str) -> Iterator[Part]:
    yield _plain(conv.weight, f"{key}.weight")
    yield _plain(cast(Tensor, conv.bias), f"{key}.bias")


def _parts_of_step(step: list[Flow], key: str) -> Iterator[Part]:
    """step: an actnorm, a 1x1 convolution, and what comes behind it."""
    norm, permutation, third = step
    yield from _parts_of_norm(cast(ActNorm, norm), f"{key}.actnorm")
    yield _plain(cast(InvertibleConv1x1, permutation).weight, f"{key}.invconv.weight")
    for flow in third.modules():
        if isinstance(flow, SigmoidCoupling):
            name = "fFeatures" if isinstance(flow, AffineInjector) else "fAffine"
            network = cast(GlowConditioner, flow.conditioner)
            yield from _parts_of_network(network, f"{key}.affine.{name}")


def _parts_of_network(network: GlowConditioner, key: str) -> Iterator[Part]:
    yield _plain(network.conv_in.weight, f"{key}.0.weight")
    yield from _parts_of_norm(network.norm_in, f"{key}.0.actnorm")
    yield _plain(network.conv_mid.weight, f"{key}.2.weight")
    yield from _parts_of_norm(network.norm_mid, f"{key}.2.actnorm")
    yield from _parts_of_last(network.conv_out, f"{key}.4")


def _parts_of_norm(norm: ActNorm, key: str) -> Iterator[Part]:
    channels = norm.bias.numel()
    for name, tensor in (("bias", norm.bias), ("logs", norm.log_scale)):
        yield Part(tensor, f"{key}.{name}", False, (1, channels, 1, 1))


def _parts_of_last(conv: ZeroConv2d, key: str) -> Iterator[Part]:
    """The last convolution of a network, or that of a prior."""
    channels = conv.weight.shape[0]
    yield Part(conv.weight, f"{key}.weight", True, tuple(conv.weight.shape))
    yield Part(conv.shift, f"{key}.bias", True, (channels,))
    yield Part(conv.log_scale, f"{key}.logs", True, (channels, 1, 1))


def _plain(tensor: Tensor, key: str) -> Part:
    return Part(tensor, key, False, tuple(tensor.shape))


def renamed(released: Released, weights: Weights, path: Path) -> Weights:
    """The weights of a file by the keys of the state dict of its network, float32.

    ConfigError, one line: keys are missing or not known, or tensors have other shapes.
    """
    network = released.network
    check_keys(released.parts, weights, path)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    ours = {}
    for part in released.parts:
        value = weights[part.key].float()
        if part.is_interleaved:
            value = halves(value)
        ours[names[id(part.tensor)]] = value.reshape(part.tensor.shape).clone()
    norms = [name for name, module in network.named_modules() if isinstance(module, ActNorm)]
    return ours | {f"{name}.initialized": torch.tensor(True) for name in norms}


def check_keys(parts: list[Part], weights: Mapping[str, Tensor], path: Path) -> None:
    """ConfigError, one line: the tensors of a file are not those of the parts of a flow."""
    shapes = {part.key: part.shape for part in parts}
    missing = [key for key in shapes if key not in weights]
    unknown = [key for key in weights if key not in shapes and not UNUSED.fullmatch(key)]
    faults = [
        f"{key} is {tuple(weights[key].shape)} and has to be {shape}"
        for key, shape in shapes.items()
        if key in weights and tuple(weights[key].shape) != shape
    ]
    if missing:
        raise ConfigError(f"{path} lacks {listed(missing)}: {HINT}")
    if unknown:
        raise ConfigError(f"{path} has {listed(unknown)}, which no SRFlow has: {HINT}")
    if faults:
        raise ConfigError(f"{path} does not fit together: {listed(faults)}; {HINT}")


def halves(interleaved: Tensor) -> Tensor:
    """The even channels, followed by the odd ones, along the first axis.

    >>> halves(torch.tensor([0, 1, 2, 3]))
    tensor([0, 2, 1, 3])
    """
    return torch.cat([interleaved[0::2], interleaved[1::2]])
