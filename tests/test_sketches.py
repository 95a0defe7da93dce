"""The sketches of future systems, trained: a flow, a dequantiser, an objective of each kind.

Each is given to the project's own module, callbacks and trainer, through public parts alone. As
flows they are tested in test_contract.py.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from sketch_denoiser import Denoiser
from sketch_dequantizer import LogitNormal
from sketch_nice import Nice
from sketch_residual import ResidualFlow
from sketch_super_resolution import SuperResolution
from test_density import SHAPE, RandomImages, Recorder, fit, make_trainer
from test_distributed import on_two_ranks
from torch import nn
from torch.nn import functional as F

from datamodules.two_moons import TwoMoons
from flows.base import FlowModel
from flows.coupling import AdditiveCoupling
from flows.glow import Glow
from flows.normalization import uninitialized
from lightning_modules.callbacks.density_2d import Density2d
from lightning_modules.callbacks.initialization import Initialization, n_data
from lightning_modules.callbacks.samples import Samples, margin
from lightning_modules.density import DensityModule
from results.metrics import kind_of

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in (
        "does not have many workers",
        "LeafSpec.* is deprecated",
        "The dirpath has changed",
        "Total length of",
    )
]


class WithLowRes(torch.utils.data.Dataset):
    """Images and the same at a quarter of their size: (image, index, low_res)."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        image, index = self.images[key]
        return image, index, F.avg_pool2d(image[None] / 256, 4)[0]


class LowRes(RandomImages):
    """Random images for super-resolution."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        for split in ("train", "val", "test"):
            setattr(self, split, WithLowRes(getattr(self, split)))


def trained(flow, data, *callbacks, dequantizer=None, steps=6, **settings):
    """The module after some steps, its losses, and the metrics of its test."""
    config = SimpleNamespace(seed=0, optim={"lr": 1e-2}, eval={"bn_images": 0})
    module = DensityModule.of(config, flow, data, dequantizer)
    recorder = fit(
        module,
        data,
        callbacks,
        max_steps=steps,
        limit_val_batches=None,
        inference_mode=not module.needs_autograd,
    )
    trainer = make_trainer(inference_mode=not module.needs_autograd)
    [tested] = trainer.test(module, data, verbose=False)
    return module, recorder.losses, tested


def test_super_resolution_trains_and_draws_given_images_of_validation(tmp_path):
    torch.manual_seed(0)
    flow = SuperResolution()
    pictures = Samples(tmp_path, [0.0, 0.8], 8, 1)
    module, losses, tested = trained(flow, LowRes(), Initialization(), pictures)
    assert not uninitialized(flow)
    assert losses[-1] < losses[0] - 5
    assert set(tested) == {"test/bpd"}
    assert pictures.finite == {"samples/finite_T0": 1.0, "samples/finite_T0.8": 1.0}
    assert {"reconstruction-0000006.png", "samples-0000006.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
    with Image.open(tmp_path / "reconstruction-0000006.png") as image:
        # 8x8 images are shown eight times as large, and labels are on the left of them.
        labels = margin(["data", "reconstruction"], image.height)
        pixels = torch.from_numpy(np.array(image)).float()[::8, labels.shape[2] :: 8]
    # There are two rows of images, with borders of two pixels.
    images = pixels[2:10]
    again = pixels[12:20]
    assert images[:, 2:10].std() > 10
    assert (images - again).abs().max() <= 1
    batch = [part[:3] for part in LowRes().initialization_batch(3)]
    samples = module.draw(3, 0.5, 0, batch)
    assert samples.shape == (3, *SHAPE)
    images, indices, low_res = batch
    flipped = module.draw(3, 0.5, 0, [images, indices, low_res.flip(0)])
    differences = (samples - flipped).abs().amax((1, 2, 3))
    assert differences.gt(1e-4).tolist() == [True, False, True]


def test_an_additive_flow_onto_a_logistic_base_trains():
    torch.manual_seed(0)
    module, losses, tested = trained(Nice(SHAPE), RandomImages())
    assert losses[-1] < losses[0] - 5
    assert set(tested) == {"test/bpd"}
    assert module.draw(4, 1.0, 0).shape == (4, *SHAPE)


def test_an_estimate_trains_and_is_the_same_at_every_evaluation():
    torch.manual_seed(0)
    data = TwoMoons(batch_size=64, n_train=256, n_val=64, n_test=200)
    module, losses, tested = trained(ResidualFlow((2,)), data, steps=8)
    assert losses[-1] < losses[0]
    assert set(tested) == {"test/nll_estimate"}
    other_batches = TwoMoons(50, n_test=200)
    [again] = make_trainer(inference_mode=False).test(module, other_batches, verbose=False)
    assert again["test/nll_estimate"] == pytest.approx(tested["test/nll_estimate"], abs=1e-5)


def test_a_learned_dequantiser_trains_and_its_metric_is_a_bound():
    torch.manual_seed(0)
    dequantizer = LogitNormal(8)
    before = dequantizer.mean.detach().clone()
    module, losses, tested = trained(Nice(SHAPE), RandomImages(), dequantizer=dequantizer)
    assert losses[-1] < losses[0] - 5
    assert set(tested) == {"test/bpd_bound"}
    assert (module.dequantizer.mean != before).all()


# ---------------------------------------------------------------------- what they share


def parts_on(rank=0, ranks=1):
    """Losses, weights after training and tested metrics of three modules, by name."""
    torch.manual_seed(0)
    images = RandomImages()
    points = TwoMoons(batch_size=16, n_train=64, n_val=8, n_test=23)
    modules = {
        "bound": (DensityModule(Nice(SHAPE), LogitNormal(8), 8, seed=0), images),
        "estimate": (DensityModule(ResidualFlow((2,)), None, None, seed=0), points),
        "denoiser": (
            Denoiser(nn.Conv2d(3, 3, 3, padding=1), SHAPE, name="adam", lr=1e-2),
            RandomImages(),
        ),
    }
    outcome = {}
    for name, (module, data) in modules.items():
        recorder = Recorder()
        trainer = make_trainer(
            recorder,
            max_steps=4,
            precision="64-true",
            devices=ranks,
            num_nodes=1,
            inference_mode=False,
        )
        if module.needs_initialization():
            module.initialize(data.initialization_batch(64))
        trainer.fit(module, datamodule=data)
        [tested] = trainer.test(module, data, verbose=False)
        losses = torch.tensor(recorder.losses, dtype=torch.float64)
        outcome[name] = {"losses": losses, "state": module.state_dict(), "tested": tested}
    return outcome


def _parts_on(rank):
    return parts_on(rank, 2)


def test_two_ranks_train_a_learned_dequantiser_an_estimate_and_a_denoiser_as_one_process_does(
    tmp_path,
):
    in_one_process = parts_on()
    outcomes = on_two_ranks(tmp_path, _parts_on)
    for name, alone in in_one_process.items():
        first, second = (outcome[name] for outcome in outcomes)
        losses = (first["losses"] + second["losses"]) / 2
        torch.testing.assert_close(losses, alone["losses"], rtol=0, atol=1e-9)
        for key, value in alone["state"].items():
            torch.testing.assert_close(first["state"][key], value, rtol=0, atol=1e-8)
            assert torch.equal(first["state"][key], second["state"][key])
        assert first["tested"] == second["tested"] == pytest.approx(alone["tested"], abs=1e-6)
    assert list(in_one_process["bound"]["tested"]) == ["test/bpd_bound"]
    assert list(in_one_process["estimate"]["tested"]) == ["test/nll_estimate"]
    assert list(in_one_process["denoiser"]["tested"]) == ["test/psnr"]


def test_a_density_in_the_plane_can_be_an_estimate(tmp_path):
    """Its integral is about 1; the noise of the estimate belongs to the points of the grid."""
    module = DensityModule(ResidualFlow((2,)), None, None, seed=0)
    plane = Density2d(tmp_path, 50, box=(-5, 5, -5, 5), cell=0.1)
    trainer = make_trainer(plane, inference_mode=False)
    [tested] = trainer.test(module, TwoMoons(64, n_test=64), verbose=False)
    assert tested["density_integral"] == pytest.approx(1, abs=0.05)
    x = torch.rand(3, 2)
    assert torch.equal(module.log_prob(x), module.log_prob(x))


class AnySize(RandomImages):
    """Images from data that name no size, as photographs do not; here all have one size."""

    shape = (3, None, None)


def test_data_of_any_size_train_and_samples_are_as_large_as_images_of_validation(tmp_path):
    torch.manual_seed(0)
    flow = Glow((3, None, None), 2, 1, 4)
    pictures = Samples(tmp_path, [0.7], 4, 1)
    module, losses, tested = trained(flow, AnySize(), Initialization(), pictures)
    assert losses[-1] < losses[0]
    assert set(tested) == {"test/bpd"}
    assert pictures.finite == {"samples/finite_T0.7": 1.0}
    assert module.trial(2) is None
    assert module.draw(2, 1.0, 0) is None
    batch = [torch.zeros(1, 3, 4, 12), torch.zeros(1)]
    assert module.draw(2, 1.0, 0, batch).shape == (2, 3, 4, 12)
    assert n_data(module.shape) == 256


@pytest.mark.parametrize(
    ("flow", "dequantizer", "name"),
    [
        (Nice, LogitNormal, "bpd_bound"),
        (ResidualFlow, LogitNormal, "bpd_bound_estimate"),
        (ResidualFlow, None, "nll_estimate"),
    ],
)
def test_a_metric_has_the_kinds_of_flow_and_dequantiser(flow, dequantizer, name):
    if dequantizer is None:
        module = DensityModule(flow((4,)), None, None, seed=0)
    else:
        module = DensityModule(flow((4,)), dequantizer(8), 8, seed=0)
    assert module.metric.name == name
    assert kind_of(f"test/{name}_reestimated") == name.partition("_")[2]


class Dropout(FlowModel):
    """Points whose second coordinate is shifted by a network of the first, with dropout."""

    shape = (2,)

    def __init__(self):
        super().__init__()
        net = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 1))
        self.layer = AdditiveCoupling(WithoutContext(net))

    def latent_shapes(self, shape=None):
        return (self.shape,)

    def forward(self, x, context=None):
        z, log_det = self.layer(x)
        return (z,), log_det

    def inverse(self, z, context=None):
        return self.layer.inverse(z[0])


class WithoutContext(nn.Module):
    """A network that ignores the context."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, context=None):
        return self.net(x)


def test_a_flow_with_dropout_goes_on_bit_for_bit(tmp_path):
    """Dropout draws from torch's own generator, whose state no checkpoint holds."""

    def run(steps, global_seed, checkpoint=None):
        torch.manual_seed(0)
        module = DensityModule(Dropout(), None, None, seed=0, lr=1e-2)
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = make_trainer(saver, max_steps=steps, enable_checkpointing=True)
        data = TwoMoons(batch_size=16, n_train=128, n_val=8, n_test=8)
        torch.manual_seed(global_seed)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return module.state_dict()

    whole = run(6, global_seed=7)
    resumed = run(6, global_seed=8, checkpoint=tmp_path / "step=2.ckpt")
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
