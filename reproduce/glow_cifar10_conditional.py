"""Class-conditional Glow on CIFAR-10 (Kingma & Dhariwal 2018, arXiv 1807.03039).

It draws samples of a chosen class.

python reproduce/glow_cifar10_conditional.py                # the authors' recipe
python reproduce/glow_cifar10_conditional.py preset=cpu     # a smaller model for two cores
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules import make_data
from flows.glow import Glow
from lightning_modules.class_conditional import ClassConditionalModule
from lightning_modules.objective import Data
from reproduce.experiment import command, fit, load_config, make_trainer, record


def make_flow(config: DictConfig, shape: tuple[int, ...]) -> Glow:
    return Glow(shape, **config.flow)


def make_module(config: DictConfig, flow: Glow, data: Data) -> ClassConditionalModule:
    return ClassConditionalModule.of(config, flow, data)


@command
def main(argv: list[str] | None = None) -> dict:
    config = load_config(__file__, __doc__, argv)
    data = make_data(seed=config.seed, **config.data)
    flow = make_flow(config, data.shape)
    module = make_module(config, flow, data)
    trainer = make_trainer(config, module)
    fit(config, trainer, module, data)
    return record(config, trainer, module, data)


if __name__ == "__main__":
    main()
