"""SRFlow on the 400 photographs of BSDS500's train and test, 4 times as high and wide.

The model is that of srflow_div2k_x4. It is tested on BSDS500's val, which is the set BSD100. No
paper has a number for these training images.

python reproduce/rrdb_bsds_x4.py               # first, the encoder; wants a GPU
python reproduce/srflow_bsds_x4.py flow.encoder_checkpoint=outputs/rrdb_bsds_x4/RUN
python reproduce/srflow_bsds_x4.py preset=cpu  # a smaller model for two cores
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
