"""RealNVP on CIFAR-10 (Dinh et al. 2017, arXiv 1605.08803), Table 1: 3.49 bits/dim on the test set.

python reproduce/realnvp_cifar10.py                # the paper's recipe
python reproduce/realnvp_cifar10.py preset=cpu     # a smaller model for two cores
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules import make_data
from flows.realnvp import RealNVP
from lightning_modules.density import DensityModule
from lightning_modules.objective import Data
from reproduce.experiment import command, fit, load_config, make_trainer, record


def make_flow(config: DictConfig, shape: tuple[int, ...]) -> RealNVP:
    return RealNVP(shape, **config.flow)


def make_module(config: DictConfig, flow: RealNVP, data: Data) -> DensityModule:
    return DensityModule.of(config, flow, data)


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
