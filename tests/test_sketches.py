"""The sketches of systems to come, trained: what is tested of flows alone stands in test_contract.py.

Each is handed to the house's own module, callbacks and trainer, through public seams alone.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sketch_dequantizer import LogitNormal
from sketch_nice import Nice
from sketch_residual import ResidualFlow
from sketch_super_resolution import SuperResolution
from test_density import SHAPE, RandomImages, fit, make_trainer
from torch.nn import functional as F

from datamodules.two_moons import TwoMoons
from flows.normalization import uninitialized
from lightning_modules.callbacks.initialization import Initialization
from lightning_modules.callbacks.samples import Samples
from lightning_modules.density import DensityModule

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("does not have many workers", "LeafSpec.* is deprecated", "The dirpath has changed", "Total length of")
]


class WithLowRes(torch.utils.data.Dataset):
    """Images with what is left of them at a quarter of their size, as (image, index, low_res)."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        image, index = self.images[key]
        return image, index, F.avg_pool2d(image[None] / 256, 4)[0]


class LowRes(RandomImages):
    """RandomImages for super-resolution."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        for split in ("train", "val", "test"):
            setattr(self, split, WithLowRes(getattr(self, split)))


def trained(flow, data, *callbacks, dequantizer=None, steps=6, **settings):
    """The module after some steps, its losses, and what was tested."""
    config = SimpleNamespace(seed=0, optim={"lr": 1e-2}, eval={"bn_images": 0})
    module = DensityModule.of(config, flow, data, dequantizer)
    recorder = fit(
        module, data, callbacks, max_steps=steps, limit_val_batches=None, inference_mode=not module.needs_autograd
    )
    trainer = make_trainer(inference_mode=not module.needs_autograd)
    [tested] = trainer.test(module, data, verbose=False)
    return module, recorder.losses, tested


def test_a_flow_given_an_image_trains_is_tested_and_draws_given_the_images_of_validation(tmp_path):
    torch.manual_seed(0)
    flow, pictures = SuperResolution(), Samples(tmp_path, [0.0, 0.8], 8, 1)
    module, losses, tested = trained(flow, LowRes(), Initialization(), pictures)
    assert not uninitialized(flow)
    assert losses[-1] < losses[0] - 5
    assert set(tested) == {"test/bpd"}
    assert pictures.finite == {"samples/finite_T0": 1.0, "samples/finite_T0.8": 1.0}
    assert {"reconstruction-0000006.png", "samples-0000006.png"} <= {path.name for path in tmp_path.iterdir()}
    with Image.open(tmp_path / "reconstruction-0000006.png") as image:
        pixels = torch.from_numpy(np.array(image)).float()[::8, ::8]  # 8x8 images are shown eight times as large
    images, again = pixels[2:10], pixels[12:20]  # two rows of them, with borders of two pixels
    assert images[:, 2:10].std() > 10
    assert (images - again).abs().max() <= 1
    batch = [part[:3] for part in LowRes().initialization_batch(3)]
    one, other = (module.draw(3, 0.5, 0, [*batch[:2], low_res]) for low_res in (batch[2], batch[2].flip(0)))
    assert one.shape == (3, *SHAPE)
    assert (one - other).abs().amax((1, 2, 3)).gt(1e-4).tolist() == [True, False, True]


def test_an_additive_flow_onto_a_logistic_base_trains():
    torch.manual_seed(0)
    module, losses, tested = trained(Nice(SHAPE), RandomImages())
    assert losses[-1] < losses[0] - 5
    assert set(tested) == {"test/bpd"}
    assert module.draw(4, 1.0, 0).shape == (4, *SHAPE)


def test_an_estimate_trains_is_called_so_and_is_the_same_at_every_evaluation():
    torch.manual_seed(0)
    data = TwoMoons(batch_size=64, n_train=256, n_val=64, n_test=200)
    module, losses, tested = trained(ResidualFlow((2,)), data, steps=8)
    assert losses[-1] < losses[0]
    assert set(tested) == {"test/nll_estimate"}
    [again] = make_trainer(inference_mode=False).test(module, TwoMoons(50, n_test=200), verbose=False)
    assert again["test/nll_estimate"] == pytest.approx(tested["test/nll_estimate"], abs=1e-5)


def test_a_learned_dequantiser_trains_and_its_figure_is_a_bound():
    torch.manual_seed(0)
    dequantizer = LogitNormal(8)
    before = dequantizer.mean.detach().clone()
    module, losses, tested = trained(Nice(SHAPE), RandomImages(), dequantizer=dequantizer)
    assert losses[-1] < losses[0] - 5
    assert set(tested) == {"test/bpd_bound"}
    assert (module.dequantizer.mean != before).all()
