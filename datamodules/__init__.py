"""Datamodules: integers out, stateless order. They know n_bits, the shape of one datum and how to dequantise it."""

from datamodules.cifar10 import CIFAR10
from datamodules.photos import Photos
from datamodules.stateless import StatelessDataModule
from datamodules.two_moons import TwoMoons

DATA: dict[str, type[StatelessDataModule]] = {
    "cifar10": CIFAR10,
    "photos": Photos,
    "two_moons": TwoMoons,
}


def make_data(name: str, seed: int, **arguments) -> StatelessDataModule:
    """The datamodule called `name`, e.g. make_data("cifar10", seed=0, root="data", batch_size=64, ...)."""
    return DATA[name](seed=seed, **arguments)
