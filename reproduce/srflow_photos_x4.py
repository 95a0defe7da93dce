"""SRFlow on the photographs inside scikit-image and scikit-learn, 4 times as high and wide.

There is nothing to download, and no paper's number to compare with.

python reproduce/srflow_photos_x4.py                # wants a GPU
python reproduce/srflow_photos_x4.py preset=demo    # three minutes on two cores
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules import make_data
from flows.srflow import SRFlow
from lightning_modules.objective import Data
from lightning_modules.super_resolution import SuperResolutionModule
from reproduce.experiment import command, fit, load_config, make_trainer, record
from reproduce.pretrained_encoder import flow_settings


def make_flow(config: DictConfig, shape: tuple[int, ...]) -> SRFlow:
    return SRFlow((shape[0], None, None), **flow_settings(config))


def make_module(config: DictConfig, flow: SRFlow, data: Data) -> SuperResolutionModule:
    return SuperResolutionModule.of(config, flow, data)


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
