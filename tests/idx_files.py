"""Small idx files, which MNIST and Fashion-MNIST take for their official ones."""

import hashlib
from types import SimpleNamespace

import numpy as np

from datamodules.mnist import MNIST, FashionMNIST


def idx(array):
    """The content of an idx file with an array of bytes."""
    header = np.array([0x0800 + array.ndim, *array.shape], ">i4")
    return header.tobytes() + array.astype(np.uint8).tobytes()


def make_official(monkeypatch, n_train, n_test):
    """Make the arrays of both splits, and let both data sets take their md5 for the official one.

    Returns `train`, (n_train, 28, 28), `test`, `train_labels`, `test_labels`, and `contents`, the
    contents of the four files by name.
    """
    rng = np.random.default_rng(0)
    arrays = {}
    contents = {}
    for split, prefix, n in (("train", "train", n_train), ("test", "t10k", n_test)):
        arrays[split] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 10, n)
        contents[f"{prefix}-images-idx3-ubyte"] = idx(arrays[split])
        contents[f"{prefix}-labels-idx1-ubyte"] = idx(arrays[f"{split}_labels"])
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    for data_set in (MNIST, FashionMNIST):
        monkeypatch.setattr(data_set, "md5", md5)
    return SimpleNamespace(contents=contents, **arrays)


def write(folder, contents):
    """Write the files, unpacked."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
