"""What the commands on a trained model share: their words, the device, a bar, and being stopped."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from reproduce.config import KEY, ConfigError, merge, parse

MODEL = "MODEL"  # the first word of every command on a trained model


def read_words(
    words: Sequence[str], names: Sequence[str], defaults: Mapping[str, object]
) -> tuple[list[str], DictConfig]:
    """Read a command line: words that stand for themselves, and key=value words, in any order.

    A word that looks like key=value and is an existing file or folder stands for itself.

    words: the command line. names: those of the first kind of words, as the help gives them.
    defaults: the keys and their values; a key takes values of the kind of its default.
    ConfigError, one line: a word is missing, or not understood.
    """
    plain: list[str] = []
    settings: list[str] = []
    for word in words:
        if len(plain) < len(names) and _stands_for_itself(word):
            plain.append(word)
        else:
            settings.append(word)
    texts = parse(settings)
    if len(plain) < len(names):
        raise ConfigError(f"{names[len(plain)]} is missing: give {' '.join(names)}, and see --help")
    return plain, merge(OmegaConf.create(dict(defaults)), texts)


def _stands_for_itself(word: str) -> bool:
    key, separator, _ = word.partition("=")
    is_setting = bool(separator) and KEY.fullmatch(key) is not None
    return os.path.exists(word) or not (is_setting or word.startswith("-"))


def at_least(options: DictConfig, **bounds: float) -> None:
    """ConfigError, one line: a number is below its bound."""
    for key, bound in bounds.items():
        if options[key] < bound:
            raise ConfigError(f"{key}={options[key]} is out of range: give at least {bound}")


def device_of(text: str) -> str:
    """The device that device= names; without a name a GPU if there is one.

    ConfigError, one line: there is no such device.
    """
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    device = text or devices[0]
    if device not in devices:
        raise ConfigError(f"device={device} is not here: give {' or '.join(devices)}")
    return device


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A SHA-256 of weights, as hexadecimal digits: the same for equal weights, however stored."""
    digest = hashlib.sha256()
    for key, value in sorted(weights.items()):
        content = value.detach().cpu().contiguous()
        digest.update(f"{key} {content.dtype} {tuple(content.shape)}\n".encode())
        digest.update(content.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def progress_bar(total: int, unit: str) -> Tqdm:
    """A bar on standard error with the time left; none is drawn where that is no terminal."""
    return Tqdm(
        total=total,
        unit=f" {unit}",
        file=sys.stderr,
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
    )


@contextlib.contextmanager
def opening(path: Path) -> Iterator[None]:
    """ConfigError, one line, if the block cannot write to a path, which out= has given."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}): give another out="
        ) from error


@contextlib.contextmanager
def repeatable(what: str) -> Iterator[None]:
    """End with one line if the user stops the block with Ctrl-C.

    what: what the same command does when it is given again.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"stopped: {what}")
