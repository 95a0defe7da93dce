"""RRDB on photographs, 4 times as high and wide, from which srflow_div2k_x4 takes its encoder.

It is trained for the L1 error, as Lugmayr et al. 2020 (arXiv 2006.14200) do before the
flow.
They compare with 29.44 dB PSNR on DIV2K's validation images.

python reproduce/rrdb_div2k_x4.py              # wants a GPU
python reproduce/rrdb_div2k_x4.py preset=demo
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules import make_data
from flows.srflow import RRDB
from lightning_modules.objective import Data
from lightning_modules.regression import RegressionModule
from reproduce.experiment import command, fit, load_config, make_trainer, record


def make_flow(config: DictConfig, shape: tuple[int, ...]) -> RRDB:
    return RRDB(**config.flow)


def make_module(config: DictConfig, flow: RRDB, data: Data) -> RegressionModule:
    return RegressionModule.of(config, flow, data)


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
