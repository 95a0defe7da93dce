"""Glow on crops of the photographs inside scikit-image and scikit-learn.

There is nothing to download, and no paper's number to compare with.

python reproduce/glow_photos.py                # wants a GPU
python reproduce/glow_photos.py preset=cpu     # a smaller model for two cores
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules import make_data
from flows.glow import Glow
from lightning_modules.density import DensityModule
from lightning_modules.objective import Data
from reproduce.experiment import command, fit, load_config, make_trainer, record


def make_flow(config: DictConfig, shape: tuple[int, ...]) -> Glow:
    return Glow(shape, **config.flow)


def make_module(config: DictConfig, flow: Glow, data: Data) -> DensityModule:
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
