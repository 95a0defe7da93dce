"""Networks that turn images into features, with weights that are read safely and named by hash."""

import contextlib
import hashlib
import io
import os
import urllib.request
import warnings
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_modules.checkpoint_io import flush_folder, reason

URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
PUBLISHED = "6726825d"  # the first digits of the published file's SHA-256, which its name gives
TIMEOUT = 15  # seconds without any data, after which a download counts as impossible
LAYERS = ("64", "192", "768", "2048")  # of the network, by their numbers of features
COUNTER = "num_batches_tracked"  # of a batch norm; older files lack it, and no result depends on it
NAMED = 3  # keys that a message names


class WeightsMissing(Exception):
    """The weights of a network are not here and cannot be had. The message is one line."""


class Features(NamedTuple):
    """What an extractor computes from images, in float64 on the CPU.

    layer: (n, d), the features that distributions are compared by.
    logits: (n, c), of the classes without their biases, for the Inception Score; None: no score.
    """

    layer: Tensor
    logits: Tensor | None


class Extractor(Protocol):
    """A network that turns images into features. It is not part of any model.

    name: what a protocol calls the network. layer: the name of its layer. resize: how images are
    brought to the network's size. sha256: of its weights. is_published: whether they are those
    that figures in papers are computed with.
    """

    name: str
    layer: str
    resize: str
    sha256: str
    is_published: bool

    def __call__(self, images: Tensor) -> Features:
        """The features of images, (B, 3, H, W) uint8 on any device."""
        ...


class Inception:
    """The Inception-v3 network of FID, with weights ported from TensorFlow's of 2015-12-05.

    The architecture and the resize, bilinear as in TensorFlow 1, are those of torch-fidelity. The
    weights are read by `read_weights`: torch-fidelity's own reader would run code in the file.

    path: the file of the weights, .pth or .safetensors. None: torch.hub's cache, into which the
        published file is downloaded if it is not there.
    layer: "64", "192", "768" or "2048", by the number of features; papers use the last.
    Raises WeightsMissing: there is no path, and no file in the cache that can be used. Raises
    ValueError: the file that `path` names cannot be used, or there is no such layer.
    """

    name = "inception-v3-compat"
    resize = "bilinear as in TensorFlow 1, 299 x 299"

    def __init__(self, path: str | Path | None = None, layer: str = "2048") -> None:
        if layer not in LAYERS:
            raise ValueError(f"layer={layer}: give {', '.join(LAYERS[:-1])} or {LAYERS[-1]}")
        self.layer = layer
        self.network = inception_architecture(layer)
        expected = self.network.state_dict()
        if path is None:
            weights, self.sha256 = published_weights(URL, PUBLISHED, expected)
        else:
            weights, self.sha256 = read_weights(path, expected)
        self.network.load_state_dict(weights, assign=True)
        self.is_published = self.sha256.startswith(PUBLISHED)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """The features of images, (B, 3, H, W) uint8. The network follows them to their device."""
        self.network.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            layer, *logits = self.network(images)
        biased = [part.double().cpu() for part in logits]
        return Features(layer.double().cpu(), biased[0] if biased else None)


def inception_architecture(layer: str) -> nn.Module:
    """torch-fidelity's Inception-v3 in eval mode, with weights on torch's `meta` device.

    The network has no values yet, so that none is drawn from the global random generator.

    layer: see `Inception`. At "2048" the network also returns the logits without biases.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        """The network, whose constructor's weights, an empty dictionary of ours, are ignored."""

        def load_state_dict(
            self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
        ) -> Any:
            return super().load_state_dict(state_dict, bool(state_dict), assign)

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    layers = [layer, "logits_unbiased"] if layer == "2048" else [layer]
    with torch.device("meta"):
        return Unloaded("inception", layers, feature_extractor_weights_path=nothing)


def published_weights(
    url: str, sha256: str, expected: Mapping[str, Tensor], unused: str | None = None
) -> tuple[dict[str, Tensor], str]:
    """Published weights from torch.hub's cache, downloaded if they are not there.

    sha256: the first digits of the hash of the file at `url`. The other arguments and what is
    returned are those of `read_weights`. Raises WeightsMissing.
    """
    path = hub_file(url)
    try:
        if not path.is_file():
            download(url, path, sha256)
        return read_weights(path, expected, unused)
    except OSError as error:
        raise WeightsMissing(described(error)) from error
    except ValueError as error:
        again = "delete it, so that it is downloaded again"
        raise WeightsMissing(f"{error}; {again}") from error


def described(error: OSError | ValueError | HTTPException) -> str:
    """An error in one line, with the file that the operating system's message does not name.

    >>> described(PermissionError(13, "Permission denied", "/cache/torch"))
    '/cache/torch: Permission denied'
    >>> described(OSError("https://host/file could not be downloaded"))
    'https://host/file could not be downloaded'
    """
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if error.args and error.args[0] == str(error):  # a message of ours, whose cause is in it
        return " ".join(str(error).split())
    return reason(error)


def hub_file(url: str) -> Path:
    """The file in torch.hub's cache folder in which a download from `url` is kept."""
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])


def download(url: str, path: Path, sha256: str) -> None:
    """Download a file, and write it in one step once its hash has been checked.

    sha256: the first digits of the hash. Raises OSError: it cannot be downloaded, or its hash is
    another.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    hashed = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # before 100 MB come in vain
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, part.open("wb") as file:
            while block := answer.read(1 << 20):
                hashed.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        if not hashed.hexdigest().startswith(sha256):
            raise OSError(f"the download is damaged: its SHA-256 does not begin with {sha256}")
        part.replace(path)
        flush_folder(path.parent)
    except (OSError, ValueError, HTTPException) as error:  # errors of HTTP are of all these kinds
        raise OSError(f"{url} could not be downloaded: {described(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def read_weights(
    path: str | Path, expected: Mapping[str, Tensor], unused: str | None = None
) -> tuple[dict[str, Tensor], str]:
    """Read the weights of a network from a file, without running code that may be in it.

    Only the counters of batch norms may be absent; they become 0.

    Args:
        path: a .safetensors file, or a state dict that torch.save has written.
        expected: the network's state dict, on any device, also `meta`.
        unused: how the keys of a part begin that the network does not have. The file may have this
            part or lack it. None: there is no such part.

    Returns:
        the state dict on the CPU, with the keys and dtypes of `expected`, and the SHA-256 of the
        file as 64 hexadecimal digits.

    Raises:
        ValueError: one line: the file cannot be read, is no state dict of tensors, has other keys
            or shapes, or values that are not finite.
    """
    path = Path(path).expanduser()
    content = _content(path)
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ValueError(f"{path} is no state dict: it has to map names to tensors")
    weights = dict(content)
    if unused is not None:
        weights = {key: value for key, value in weights.items() if not key.startswith(unused)}
    for key, value in expected.items():
        if key.endswith(COUNTER):
            weights.setdefault(key, torch.zeros(value.shape, dtype=value.dtype))
    _check(path, weights, expected)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {key: weights[key].to(value.dtype) for key, value in expected.items()}, sha256


def _content(path: Path) -> object:
    """What a file of weights holds. ValueError, one line: it cannot be read."""
    if not path.is_file():
        raise ValueError(f"{path} is no file: give the path of the weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other kinds of pickles, which fail or load
            return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file: {reason(error)}") from error
    except Exception as error:  # damaged files raise errors of many kinds
        raise ValueError(
            f"{path} cannot be read as weights alone: it is damaged, or has more in it than a "
            "state dict of tensors"
        ) from error


def _check(path: Path, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """ValueError, one line: a key is missing, unknown, of another shape, or not finite."""
    keys = {
        "lacks": expected.keys() - weights.keys(),
        "has the unknown": weights.keys() - expected.keys(),
    }
    problems = [f"{verb} {_named(names)}" for verb, names in keys.items() if names]
    for key in sorted(expected.keys() & weights.keys()):
        shape = tuple(weights[key].shape)
        expected_shape = tuple(expected[key].shape)
        if shape != expected_shape:
            problems.append(f"has {key} of shape {shape}, not {expected_shape}")
        elif not weights[key].isfinite().all():
            problems.append(f"has values in {key} that are not finite")
    if problems:
        shown = ", ".join(problems[:NAMED])
        more = f", and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise ValueError(f"{path} holds the weights of another network: it {shown}{more}")


def _named(names: set[str]) -> str:
    """The first few names, and how many more there are."""
    first = ", ".join(sorted(names)[:NAMED])
    return first if len(names) <= NAMED else f"{first} and {len(names) - NAMED} more"
