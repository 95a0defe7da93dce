"""Dequantisers as parts.

Their weights are right, and a learned one belongs to the objective as the flow does.
"""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from sketch_dequantizer import LogitNormal
from test_class_conditional import N_CLASSES, LabelledImages
from test_density import (
    SHAPE,
    RandomImages,
    bits_by_hand,
    density,
    gradients,
    make_trainer,
    tiny_flow,
)
from torch import nn

from datamodules.dequantization import Dequantizer, UniformDequantizer
from datamodules.images import ImageArray
from flows.base import Compose, FlowModel
from flows.elementwise import Logit
from flows.glow import Glow
from flows.normalization import ActNorm, uninitialized
from lightning_modules.density import DensityModule, log_mean_exp
from lightning_modules.noise import Position, batch_noise, image_noise
from reproduce.config import compose

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("does not have many workers", "LeafSpec.* is deprecated")
]
D = math.prod(SHAPE)


class Gaussian(Dequantizer):
    """Noise that leaves the bin: x = (q + 1/2 + eps) / 2^n_bits."""

    noise = "normal"
    kind = "noisy"

    def forward(self, q, noise, context=None):
        return (q.to(noise.dtype) + 0.5 + noise) / 2**self.n_bits, noise.new_zeros(len(q))


def drawn(dequantizer, n, shape, seed=0):
    """Noise of the kind that a dequantiser takes, (n, *shape), float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"uniform": torch.rand, "normal": torch.randn}[dequantizer.noise]
    return draw(n, *shape, generator=generator, dtype=torch.float64)


# ----------------------------------------------------------------------------- weights


@pytest.mark.parametrize("make", [UniformDequantizer, LogitNormal])
@pytest.mark.parametrize("levels", [(5,), (0, 7), (3, 6, 1)])
def test_importance_weights_average_to_the_volume_and_to_a_known_mass(make, levels):
    """E[1/q(u)] is the volume of the bin, 1, and E[p(x) / q(u)] the integral of p over the bin.

    Here p is prod 2 x_i on [0, 1]^D, in 1 to 3 dimensions and 3 bits, with 400,000 samples, to
    within five standard errors.
    """
    n = 400_000
    dequantizer = make(3).double()
    q = torch.tensor(levels, dtype=torch.uint8).expand(n, -1)
    with torch.no_grad():
        x, log_weight = dequantizer(q, drawn(dequantizer, n, q.shape[1:]))
    assert torch.equal((x * 8).floor().to(torch.uint8), q)
    assert log_weight.shape == (n,)
    mass = math.prod((2 * level + 1) / 8 for level in levels)  # of u in the unit cube
    for weights, expected in ((log_weight.exp(), 1.0), (log_weight.exp() * (2 * x).prod(1), mass)):
        error = weights.std().item() / math.sqrt(n)
        assert error < 0.01 * expected
        assert weights.mean().item() == pytest.approx(expected, abs=5 * error + 1e-12)


def test_log_weight_is_minus_the_log_density_of_what_was_added():
    """By dP = q(u) du in one dimension, over a grid of the noise."""
    dequantizer = LogitNormal(8).double()
    eps = torch.linspace(-3, 3, 20_001, dtype=torch.float64)[:, None]
    q = torch.full(eps.shape, 200, dtype=torch.uint8)
    with torch.no_grad():
        x, log_weight = dequantizer(q, eps)
    u = (x * 256 - 200)[:, 0]
    log_normal = -0.5 * (eps[:, 0].square() + math.log(2 * math.pi))
    slope = (u[2:] - u[:-2]) / (eps[2:, 0] - eps[:-2, 0])
    torch.testing.assert_close(-log_weight[1:-1], log_normal[1:-1] - slope.log(), atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------- in an objective


def learned(flow=None, cls=DensityModule, data=RandomImages, **arguments):
    n_classes = N_CLASSES if data.labels else None
    dequantizer = LogitNormal(8, n_classes)
    return cls(
        flow or tiny_flow(), dequantizer, data.n_bits, **({"seed": 0, "bn_images": 0} | arguments)
    )


@pytest.mark.parametrize(
    ("dequantizer", "name"),
    [(UniformDequantizer, "bpd"), (LogitNormal, "bpd_bound"), (Gaussian, "bpd_noisy")],
)
def test_the_name_of_a_metric_tells_what_kind_of_figure_it_is(dequantizer, name):
    module = DensityModule(tiny_flow(), dequantizer(8), 8, seed=0, bn_images=0)
    [tested] = make_trainer().test(module, RandomImages(), verbose=False)
    assert list(tested) == [f"test/{name}"]
    assert (module.metric.name, module.metric.direction, module.metric.unit) == (
        name,
        "lower",
        "bits/dim",
    )


def test_a_noisy_figure_is_that_of_the_noisy_data():
    data = RandomImages()
    module = DensityModule(tiny_flow(), Gaussian(8), 8, seed=0, noise_seed=2, bn_images=0)
    eps = [
        np.random.default_rng([2, i, 0]).standard_normal(SHAPE, dtype=np.float32) for i in range(23)
    ]
    x = (torch.from_numpy(data.test.images) + 0.5 + torch.from_numpy(np.stack(eps))) / 256
    with torch.no_grad():
        expected = (8 - module.flow.eval().log_prob(x) / (D * math.log(2))).mean().item()
    [tested] = make_trainer().test(module, data, verbose=False)
    assert tested["test/bpd_noisy"] == pytest.approx(expected, abs=2e-6)


def test_the_log_weight_enters_loss_and_evaluation():
    data = RandomImages()
    module = learned(l2=0.0, noise_seed=3)
    q = torch.from_numpy(data.test.images)
    eps = [
        np.random.default_rng([3, i, 0]).standard_normal(SHAPE, dtype=np.float32) for i in range(23)
    ]
    with torch.no_grad():
        x, log_weight = module.dequantizer(q, torch.from_numpy(np.stack(eps)))
        expected = 8 - (module.flow.eval().log_prob(x) + log_weight) / (D * math.log(2))
    [tested] = make_trainer().test(module, data, verbose=False)
    assert tested["test/bpd_bound"] == pytest.approx(expected.mean().item(), abs=2e-6)
    module = learned()
    losses = []
    batch = data.initialization_batch(16)
    eps = batch_noise((16, *SHAPE), 0, 0, 0, torch.device("cpu"), "normal")
    x, log_weight = module.dequantizer(batch[0], eps)
    log_prob = module.flow.train().log_prob(x)
    assert log_weight.abs().mean() > 1
    trainer = make_trainer(max_steps=1)
    module.finite_or_nan = lambda loss: losses.append(loss.item()) or loss
    trainer.fit(module, datamodule=data)
    assert losses == [pytest.approx(-(log_prob + log_weight).mean().item(), rel=1e-6)]


def test_a_dequantiser_s_parameters_are_trained_clipped_averaged_and_saved(tmp_path):
    """They come after the flow's, whose place and keys do not change."""

    class Clipped(DensityModule):
        def configure_gradient_clipping(self, *arguments, **more):
            super().configure_gradient_clipping(*arguments, **more)
            self.norm = gradients(self.trained).norm().item()
            self.noise_gradient = self.dequantizer.mean.grad.clone()

    module = learned(cls=Clipped, clip_norm=0.5, lr=0.01)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    flow = [f"flow.{key}" for key in tiny_flow().state_dict()]
    more = [f"dequantizer.{key}" for key in ("mean", "log_std")]
    assert list(before) == ["skipped", "skipped_last", *flow, *more]
    average = EMAWeightAveraging(use_buffers=False, decay=0.5)
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2)
    trainer = make_trainer(average, saver, max_steps=3, enable_checkpointing=True)
    trainer.fit(module, datamodule=RandomImages())
    parameters = trainer.optimizers[0].param_groups[0]["params"]
    assert [id(p) for p in parameters[-2:]] == [id(p) for p in module.dequantizer.parameters()]
    assert module.n_parameters == sum(p.numel() for p in parameters)
    assert module.norm == pytest.approx(0.5, rel=1e-4)
    assert (module.noise_gradient != 0).all()
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    raw = saved["current_model_state"]
    averaged = saved["state_dict"]
    for key in ("dequantizer.mean", "dequantizer.log_std"):
        assert (averaged[key] != before[key]).all()
        assert (averaged[key] != raw[key]).any()
    again = learned()
    again.load_state_dict(averaged)
    assert torch.equal(again.dequantizer.mean, averaged["dequantizer.mean"])


def test_a_dequantiser_gets_the_context():
    torch.manual_seed(0)
    flow = Glow(SHAPE, n_levels=1, depth=1, hidden_channels=4, n_classes=N_CLASSES)
    module = learned(flow, data=LabelledImages)
    data = LabelledImages()
    batch = data.initialization_batch(16)
    noises = {
        "training": batch_noise((16, *SHAPE), 0, 0, 0, torch.device("cpu"), "normal"),
        "evaluation": image_noise(batch[1], SHAPE, 0, kind="normal"),
    }
    inputs = {
        "training": module.training_input(batch, Position(0, 0)),
        "evaluation": module.input_of(batch),
    }
    for name, prepared in inputs.items():
        assert torch.equal(prepared.context, batch[2])
        assert torch.equal(prepared.x, module.dequantizer(batch[0], noises[name], batch[2])[0])
        others = (batch[2] + 1) % N_CLASSES
        assert not torch.equal(prepared.x, module.dequantizer(batch[0], noises[name], others)[0])


class Initialised(LogitNormal):
    """A dequantiser with an ActNorm of the noise, which is set from data."""

    def __init__(self, n_bits):
        super().__init__(n_bits)
        self.norm = ActNorm(3)

    def forward(self, q, noise, context=None):
        eps, log_det = self.norm(noise)
        x, log_weight = super().forward(q, eps, context)
        return x, log_weight + log_det - 0.5 * (eps.square() - noise.square()).flatten(1).sum(1)

    def initialize(self, q, noise, context=None):
        self.norm.initialize(3 * noise + 1)


def test_a_dequantiser_is_initialised_before_the_flow():
    torch.manual_seed(0)
    flow = Glow(SHAPE, n_levels=1, depth=1, hidden_channels=4)
    module = DensityModule(flow, Initialised(8), 8, seed=0)
    assert module.needs_initialization()
    batch = RandomImages().initialization_batch(64)
    module.initialize(batch)
    assert not module.needs_initialization()
    with torch.no_grad():
        x = module.training_input(batch, Position(0, 0)).x
        torch.manual_seed(0)
        alone = Glow(SHAPE, n_levels=1, depth=1, hidden_channels=4)
        alone.initialize(x)
    assert all(
        torch.equal(value, alone.state_dict()[key]) for key, value in flow.state_dict().items()
    )
    assert not uninitialized(module.dequantizer)


def test_of_takes_a_learned_dequantizer_instead_of_the_one_of_the_data():
    config = compose("realnvp_cifar10", ["preset=demo", "eval.noise_seed=4", "optim.lr=0.5"])
    data = RandomImages()
    usual = DensityModule.of(config, tiny_flow(), data)
    other = LogitNormal(8)
    assert usual.dequantizer is data.dequantizer
    assert (usual.n_bits, usual.shape, usual.seed, usual.noise_seed, usual.lr) == (
        8,
        SHAPE,
        0,
        4,
        0.5,
    )
    assert DensityModule.of(config, tiny_flow(), data, other).dequantizer is other


def test_a_dequantiser_with_batch_norms_is_refused():
    class Normed(LogitNormal):
        def __init__(self):
            super().__init__(8)
            self.norm = nn.BatchNorm2d(3)

    with pytest.raises(ValueError, match="Normed has batch norms") as error:
        DensityModule(tiny_flow(), Normed(), 8, seed=0)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------- several samples


class Slope(FlowModel):
    """The logit of x plus a bias for each pixel: its density is far from flat in a bin."""

    def __init__(self):
        super().__init__()
        self.shape = SHAPE
        self.layers = Compose([Logit(0.05)])
        self.bias = nn.Parameter(torch.linspace(-4, 4, D).view(SHAPE))

    def latent_shapes(self, shape=None):
        return (SHAPE,)

    def forward(self, x, context=None):
        z, log_det = self.layers(x)
        return (z + self.bias,), log_det

    def inverse(self, z, context=None):
        return self.layers.inverse(z[0] - self.bias)


class FewBits(RandomImages):
    """The same images in 2 bits, whose bins are wide."""

    n_bits = 2
    dequantizer = UniformDequantizer(2)

    def __init__(self, **arguments):
        super().__init__(**arguments)
        for split in ("train", "val", "test"):
            setattr(self, split, ImageArray(getattr(self, split).images, n_bits=2))


@pytest.mark.parametrize("make", [UniformDequantizer, LogitNormal])
def test_several_samples_are_importance_weighted(make):
    """The figure is log 1/k sum p(x_i) / q(x_i) of every image, in float64.

    The figure of the first sample stays what it is without the others.
    """
    data = FewBits()
    k = 16
    module = DensityModule(Slope(), make(2), 2, seed=0, noise_seed=1, noise_samples=k)
    one = DensityModule(Slope(), make(2), 2, seed=0, noise_seed=1)
    q = torch.from_numpy(data.test.images) >> 6
    terms = []
    for i in range(k):
        noise = image_noise(torch.arange(23), SHAPE, 1, i, module.dequantizer.noise)
        with torch.no_grad():
            x, log_weight = module.dequantizer(q, noise)
            terms.append((module.flow.log_prob(x) + log_weight).double().numpy())
    weighted = np.log(np.mean(np.exp(terms - np.max(terms, 0)), 0)) + np.max(terms, 0)
    expected = (2 - weighted / (D * math.log(2))).mean()
    single = module.metric.name
    [tested] = make_trainer().test(module, data, verbose=False)
    [alone] = make_trainer().test(one, data, verbose=False)
    assert set(tested) == {f"test/{single}", "test/bpd_iw16"}
    assert tested["test/bpd_iw16"] == pytest.approx(expected, abs=2e-6)
    assert alone == {f"test/{single}": tested[f"test/{single}"]}
    assert tested["test/bpd_iw16"] < tested[f"test/{single}"] - 1e-3  # a tighter bound
    assert [(m.name, m.kind, m.samples) for m in module.metrics][1] == ("bpd_iw16", "iw", 16)


def test_reestimated_statistics_have_weighted_figures_of_their_own():
    [tested] = make_trainer().test(
        density(tiny_flow(), noise_samples=2), RandomImages(), verbose=False
    )
    names = ("bpd", "bpd_reestimated", "bpd_iw2", "bpd_iw2_reestimated")
    assert set(tested) == {f"test/{name}" for name in names}
    images = RandomImages().test.images
    assert tested["test/bpd"] == pytest.approx(
        bits_by_hand(tiny_flow().eval(), images).mean().item(), abs=2e-6
    )


def test_log_mean_exp_neither_overflows_nor_loses_digits():
    samples = [torch.tensor([2000.0, -3000.0]), torch.tensor([2000.0, -3000.0 + math.log(3)])]
    mean = log_mean_exp(samples)
    assert mean.dtype == torch.float64
    torch.testing.assert_close(
        mean, torch.tensor([2000.0, -3000.0 + math.log(2)]).double(), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (UniformDequantizer(8), 8, 0),
            r"eval\.noise_samples=0 is out of range: give .* from 1 to",
        ),
        (
            (Gaussian(8), 8, 4),
            r"eval\.noise_samples=4, but bpd_noisy is not a bound, .*: give 1",
        ),
        ((None, None, 4), r"eval\.noise_samples=4, but no noise is drawn: give 1"),
    ],
)
def test_several_noise_samples_are_refused_where_they_give_no_tighter_bound(arguments, message):
    dequantizer, n_bits, k = arguments
    with pytest.raises(ValueError, match=message) as error:
        DensityModule(tiny_flow(), dequantizer, n_bits, seed=0, noise_samples=k)
    assert "\n" not in str(error.value)
