"""Data sets as Lightning datamodules, whose order depends only on the seed.

Batches of images hold integers. A datamodule knows the shape of one datum, the number of bits and
the dequantiser that turns the integers into real numbers.
"""

from typing import Any

from datamodules.cifar10 import CIFAR10
from datamodules.folder import ImageFolder
from datamodules.mnist import MNIST, FashionMNIST
from datamodules.photos import Photos
from datamodules.stateless import StatelessDataModule
from datamodules.super_resolution import SuperResolution
from datamodules.two_moons import TwoMoons

DATA: dict[str, type[StatelessDataModule]] = {
    "cifar10": CIFAR10,
    "fashion_mnist": FashionMNIST,
    "folder": ImageFolder,
    "mnist": MNIST,
    "photos": Photos,
    "super_resolution": SuperResolution,
    "two_moons": TwoMoons,
}


def make_data(name: str, seed: int, **arguments: Any) -> StatelessDataModule:
    """Make the datamodule called `name`, one of the keys of `DATA`.

    arguments: the other arguments of its constructor. Raises ValueError: one of them is out of its
    range.

    >>> data = make_data("two_moons", seed=0, batch_size=100, n_train=1000)
    >>> data.shape
    (2,)
    >>> data.setup()
    >>> data.n_train
    1000
    """
    return DATA[name](seed=seed, **arguments)
