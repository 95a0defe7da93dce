"""The callback for super-resolution, with bicubic interpolation as the model."""

import functools
import hashlib
from importlib import metadata
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_density import make_trainer
from test_distributed import on_two_ranks

from datamodules.bicubic import downscale, upscale
from datamodules.images import ImageArray
from datamodules.stateless import StatelessDataModule
from lightning_modules.callbacks.image_quality import ImageQuality, SuperResolved
from lightning_modules.quality import extractors, naturalness
from lightning_modules.quality.naturalness import Niqe
from lightning_modules.quality.perceptual import BACKBONES, Lpips, features_of
from lightning_modules.quality.super_resolution import (
    diversity,
    low_res_psnr,
    psnr_rgb,
    psnr_y,
    ssim_rgb_uniform,
    ssim_y_gaussian,
)
from results.super_resolution import METRICS

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("does not have many workers", "It is recommended to use", "LeafSpec.* is dep")
]
SCALE = 4
reduce = functools.partial(downscale, scale=SCALE)


class Photographs(StatelessDataModule):
    """Seven smooth images with noise; a batch has at most two of them."""

    n_bits = 8
    dequantizer = None
    shape = (3, 32, 36)

    def __init__(self, n=7, side=32):
        super().__init__(2, None, num_workers=0, seed=0)
        coarse = np.random.default_rng(0).integers(0, 256, (n, 3, 4, 4), dtype=np.uint8)
        fine = upscale(torch.from_numpy(coarse), 9)[:, :, :side]
        noise = torch.randint(-9, 10, fine.shape, generator=torch.Generator().manual_seed(0))
        self.images = (fine + noise).clamp(0, 255).to(torch.uint8)
        self.train = self.val = self.test = ImageArray(self.images.numpy())


class Bicubic(L.LightningModule):
    """Bicubic interpolation; further samples have noise that depends on the image alone."""

    def __init__(self, n=1, wrong=None, returns=True):
        super().__init__()
        self.n = n
        self.wrong = wrong  # the image with a sample that is not finite
        self.returns = returns

    def test_step(self, batch, batch_idx):
        high_res = batch[0].to(torch.uint8)
        low_res = reduce(high_res)
        samples = made(low_res, self.n)
        if self.wrong in batch[1].tolist():
            samples[-1, batch[1].tolist().index(self.wrong), 0, 0, 0] = torch.inf
        if not self.returns:
            return None
        # The true images are given as uint8 and the others as floats: both are allowed.
        return SuperResolved(low_res / 255, high_res, samples)

    validation_step = test_step


def made(low_res, n):
    """n images from each low-resolution one, in [0, 1]: (n, B, 3, H, W)."""
    image = upscale(low_res, SCALE) / 255
    steps = torch.arange(n).view(n, 1, 1, 1, 1)
    return image + 0.05 * steps * (image - 0.5)


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """A file of random weights."""
    torch.manual_seed(0)
    state = {}
    for key, value in features_of(BACKBONES["alex"]).state_dict(prefix="features.").items():
        state[key] = torch.randn(value.shape) * (2 / value[0].numel()) ** 0.5
    path = tmp_path_factory.mktemp("weights") / "alexnet.safetensors"
    save_file(state, path)
    return path


def figures_of(callback, module, data=None, **arguments):
    [figures] = make_trainer(callback, **arguments).test(
        module, data or Photographs(), verbose=False
    )
    return figures


def test_figures_are_means_over_images_of_the_first_sample(alexnet):
    callback = ImageQuality(SCALE, reduce, {"alex": alexnet})
    figures = figures_of(callback, Bicubic(n=3))
    reference = Photographs().images
    low_res = reduce(reference)
    samples = (made(low_res, 3).clamp(0, 1) * 255).round().to(torch.uint8)
    image = samples[0]
    expected = {
        "test/psnr": psnr_rgb(image, reference),
        "test/ssim": ssim_rgb_uniform(image, reference),
        "test/psnr_y": psnr_y(image, reference, SCALE),
        "test/ssim_y": ssim_y_gaussian(image, reference, SCALE),
        "test/lr_psnr": low_res_psnr(image, low_res, reduce),
        "test/lpips": Lpips("alex", alexnet)(image, reference),
        "test/diversity": diversity(samples),
    }
    means = {key: values.mean().item() for key, values in expected.items()}
    assert figures == pytest.approx(means, rel=1e-6)
    assert figures["test/diversity"] > 0.5
    assert callback.not_measured == {}
    assert callback.protocol.keys() == figures.keys()
    assert callback.protocol["test/psnr_y"]["crop"] == SCALE
    assert callback.protocol["test/diversity"]["n"] == 3
    assert callback.protocol["test/lpips"]["published_weights"] is False
    assert all(facts["images"] == 7 for facts in callback.protocol.values())
    # Neither does a second test add to the first, nor does the number of samples matter.
    again = figures_of(callback, Bicubic(n=2))
    assert {key for key in figures if figures[key] != again[key]} == {"test/diversity"}


def test_protocol_is_that_of_the_command_for_bicubic():
    from reproduce import bicubic

    callback = ImageQuality(SCALE, reduce, {})
    protocol = bicubic.protocol(SCALE)
    del protocol["test/lr_psnr"]["reduction"]  # which is the module's
    assert protocol == {f"test/{name}": callback.facts[name] for name in METRICS}


def test_validation_has_its_own_names():
    callback = ImageQuality(SCALE, reduce, {})
    [figures] = make_trainer(callback, limit_val_batches=None).validate(
        Bicubic(), Photographs(), verbose=False
    )
    [again] = make_trainer(callback, limit_val_batches=None).validate(
        Bicubic(), Photographs(), verbose=False
    )
    assert again == figures
    assert callback.protocol["val/psnr"]["images"] == 7  # not those of both
    names = {"psnr", "ssim", "psnr_y", "ssim_y", "lr_psnr"}
    assert figures.keys() == {f"val/{name}" for name in names}
    assert callback.not_measured == {
        "val/diversity": "since it needs at least 2 samples for each image"
    }


def figures_on(rank=0, ranks=1, alexnet=None):
    callback = ImageQuality(SCALE, reduce, {"alex": alexnet})
    module = Bicubic(n=2)
    figures = figures_of(callback, module, Photographs(n=3), devices=ranks, num_nodes=1)
    broken = ImageQuality(SCALE, reduce, {})
    figures_of(broken, Bicubic(n=2, wrong=0), devices=ranks, num_nodes=1)
    return {
        "figures": figures,
        "images": callback.protocol["test/psnr"]["images"],
        "not_measured": broken.not_measured,
    }


def test_two_ranks_give_the_figures_of_one_process(tmp_path, alexnet):
    """Three images in batches of two: one rank has one image more than the other."""
    alone = figures_on(alexnet=alexnet)
    outcomes = on_two_ranks(tmp_path, figures_on, 2, alexnet)
    for outcome in outcomes:
        assert outcome["figures"] == pytest.approx(alone["figures"], rel=1e-6)
        assert outcome["images"] == 3
        assert outcome["not_measured"] == alone["not_measured"]
    assert outcomes[0]["figures"] == outcomes[1]["figures"]
    assert len(alone["not_measured"]) == 6


def test_samples_that_are_not_finite_have_a_reason_and_no_figure(capsys):
    callback = ImageQuality(SCALE, reduce, {})
    trainer = make_trainer(callback)
    assert trainer.test(Bicubic(n=2, wrong=4), Photographs(), verbose=False) in ([], [{}])
    reason = "since for 14.29% of 7 images a sample is not finite: give a lower temperature"
    assert set(callback.not_measured.values()) == {reason}
    assert callback.protocol == {}
    figures = figures_of(callback, Bicubic(n=2))
    assert callback.not_measured == {}
    assert callback.protocol.keys() == figures.keys()


def test_images_below_a_window_have_the_figures_that_are_possible(alexnet):
    callback = ImageQuality(SCALE, reduce, {"alex": alexnet})
    figures = figures_of(callback, Bicubic(n=2), Photographs(side=16))
    assert figures.keys() == {"test/psnr", "test/ssim", "test/psnr_y", "test/lr_psnr"} | {
        "test/diversity"
    }
    assert callback.not_measured.keys() == {"test/ssim_y", "test/lpips"}
    assert "too small" in callback.not_measured["test/ssim_y"]
    assert "give at least 31 x 31" in callback.not_measured["test/lpips"]


def test_an_error_in_a_measurement_costs_no_other_figure():
    """A training of days would be lost with its test."""

    def full(*images):
        raise RuntimeError("CUDA error: out of memory")

    callback = ImageQuality(SCALE, reduce, {})
    callback.measures["ssim"] = full
    assert "test/psnr" in figures_of(callback, Bicubic(n=1))
    assert callback.not_measured["test/ssim"] == "since CUDA error: out of memory"


def test_missing_weights_are_said_once_at_the_start(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(url, timeout):
        raise OSError("no network")

    monkeypatch.setattr(extractors.urllib.request, "urlopen", refuse)
    lines = []
    monkeypatch.setattr("lightning_modules.callbacks.image_quality.rank_zero_info", lines.append)
    callback = ImageQuality(SCALE, reduce, {"alex": None})
    assert "test/lpips" not in figures_of(callback, Bicubic())
    assert "test/lpips" not in figures_of(callback, Bicubic())
    [line] = lines
    assert line.startswith("LPIPS by alexnet: not measured, since the network's weights are miss")
    assert line.endswith("give metrics.alexnet_weights=FILE")
    assert callback.not_measured["test/lpips"] == line.partition("measured, ")[2]


halve = functools.partial(downscale, scale=2)


def test_without_its_parameters_niqe_is_not_measured_and_a_line_says_so_once(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    lines = []
    monkeypatch.setattr("lightning_modules.callbacks.image_quality.rank_zero_info", lines.append)
    callback = ImageQuality(SCALE, reduce, {}, niqe=halve)
    assert "test/niqe" not in figures_of(callback, Bicubic())
    figures = figures_of(callback, Bicubic())
    assert "test/niqe" not in figures
    assert "test/psnr" in figures
    assert lines == [
        "NIQE: not measured, since the parameters of NIQE are not installed: "
        "run pip install iqa-torch==1.2.1"
    ]
    assert callback.not_measured["test/niqe"] == lines[0].partition("measured, ")[2]


def test_niqe_is_the_mean_over_images_where_its_parameters_are_installed(tmp_path, monkeypatch):
    path = tmp_path / "parameters.npz"
    np.savez(path, mu_pris_param=np.ones((1, 36)), cov_pris_param=np.eye(36))
    installed = SimpleNamespace(locate_file=lambda name: path)
    monkeypatch.setattr(metadata, "distribution", lambda name: installed)
    monkeypatch.setattr(naturalness, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    callback = ImageQuality(SCALE, reduce, {}, niqe=halve)
    data = Photographs(n=3)
    data.images = data.images.repeat(1, 1, 6, 6)
    data.test = ImageArray(data.images.numpy())
    figures = figures_of(callback, Bicubic(n=2), data)
    image = (made(reduce(data.images), 1)[0].clamp(0, 1) * 255).round().to(torch.uint8)
    assert figures["test/niqe"] == pytest.approx(Niqe(halve)(image).mean().item(), rel=1e-6)
    assert callback.protocol["test/niqe"] == {
        "definition": "NIQE, release of 2012",
        "implementation": "paperflows",
        "luma": "ITU-R BT.601, 16 to 235, rounded",
        "crop": 0,
        "block": "96 x 96",
        "parameters_sha256": naturalness.SHA256,
        "average": "mean over images",
        "images": 3,
    }
    # Smaller images have no figure, and the others are not lost.
    small = figures_of(callback, Bicubic(n=2))
    assert "test/niqe" not in small
    assert "test/psnr" in small
    assert "too small for NIQE" in callback.not_measured["test/niqe"]


def test_wrong_use_is_one_line(alexnet):
    with pytest.raises(ValueError, match="scale=1"):
        ImageQuality(1, reduce, {})
    with pytest.raises(ValueError, match="LPIPS has no net=squeeze"):
        ImageQuality(SCALE, reduce, {"squeeze": None})
    with pytest.raises(ValueError, match="is no file: give the path of the weights"):
        ImageQuality(SCALE, reduce, {"alex": alexnet.with_name("missing.pth")})
    with pytest.raises(ValueError, match="do not fit a scale of 2"):
        figures_of(ImageQuality(2, reduce, {}), Bicubic())
    callback = ImageQuality(SCALE, reduce, {})
    make_trainer(callback).test(Bicubic(returns=False), Photographs(), verbose=False)
    assert callback.not_measured["test/psnr"] == "since the module has returned no images"


def test_half_precision_is_rounded_as_float32_is(alexnet):
    class Half(Bicubic):
        def test_step(self, batch, batch_idx):
            images = super().test_step(batch, batch_idx)
            return images._replace(samples=images.samples.half())

    callback = ImageQuality(SCALE, reduce, {})
    assert figures_of(callback, Half()) == pytest.approx(figures_of(callback, Bicubic()), rel=1e-6)


def test_the_module_and_its_checkpoint_do_not_have_the_network(alexnet):
    callback = ImageQuality(SCALE, reduce, {"alex": alexnet})
    module = Bicubic()
    figures_of(callback, module)
    assert module.state_dict() == {}
    assert callback.state_dict() == {}
