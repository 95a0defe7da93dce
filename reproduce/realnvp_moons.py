"""RealNVP for points in the plane: two moons with noise .05.

The best possible NLL is the entropy of the data, about 0.26 nats.

python reproduce/realnvp_moons.py
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules import make_data
from flows.realnvp import RealNVP2d
from lightning_modules.callbacks.density_2d import Density2d
from lightning_modules.density import DensityModule
from lightning_modules.objective import Data
from reproduce.experiment import command, fit, load_config, make_trainer, record


def make_flow(config: DictConfig, shape: tuple[int, ...]) -> RealNVP2d:
    return RealNVP2d(shape, **config.flow)


def make_module(config: DictConfig, flow: RealNVP2d, data: Data) -> DensityModule:
    return DensityModule.of(config, flow, data)


@command
def main(argv: list[str] | None = None) -> dict:
    config = load_config(__file__, __doc__, argv)
    data = make_data(seed=config.seed, **config.data)
    flow = make_flow(config, data.shape)
    module = make_module(config, flow, data)
    trainer = make_trainer(config, module, Density2d(config.run_dir, config.samples.n))
    fit(config, trainer, module, data)
    return record(config, trainer, module, data)


if __name__ == "__main__":
    main()
