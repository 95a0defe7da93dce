"""DensityModule under a real Trainer.

Optimisation, evaluation, re-estimated statistics, averaged weights, and resuming.
"""

import contextlib
import copy
import math
import warnings
from types import SimpleNamespace
from typing import ClassVar

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from cases import TINY
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from omegaconf import OmegaConf
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from datamodules.dequantization import UniformDequantizer
from datamodules.images import ImageArray
from datamodules.samplers import TrainSampler
from datamodules.stateless import StatelessDataModule
from datamodules.two_moons import TwoMoons
from flows.base import FlowModel, UninitializedWarning
from flows.glow import Glow
from flows.realnvp import RealNVP, RealNVP2d
from lightning_modules.adamax import Adamax
from lightning_modules.density import DensityModule
from lightning_modules.noise import batch_noise
from lightning_modules.precision import full_float32
from reproduce import experiment
from reproduce.config import compose

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in (
        "does not have many workers",
        "LeafSpec.* is deprecated",
        "The dirpath has changed",
        "Total length of",
    )
]
SHAPE = (3, 8, 8)


class RandomImages(StatelessDataModule):
    """64 training, 23 validation and 23 test images.

    Their values do not fill the whole range, so that a flow has something to learn.
    """

    n_bits = 8
    dequantizer = UniformDequantizer(8)
    shape = SHAPE

    def __init__(self, batch_size=16, n_train=64, n_val=23, seed=0, micro_batch=None):
        super().__init__(batch_size, micro_batch, num_workers=0, seed=seed)
        images = np.random.default_rng(0).integers(
            60, 180, (n_train + n_val + 23, *SHAPE), dtype=np.uint8
        )
        self.train = ImageArray(images[:n_train], seed, hflip=True)
        self.val = ImageArray(images[n_train:][:n_val])
        self.test = ImageArray(images[n_train + n_val :])


def tiny_flow():
    torch.manual_seed(0)
    return RealNVP(SHAPE, n_scales=2, hidden_channels=4, n_blocks=1)


def density(flow=None, data=RandomImages, cls=DensityModule, **arguments):
    return cls(
        flow or tiny_flow(),
        data.dequantizer,
        data.n_bits,
        **({"seed": 0, "bn_images": 40} | arguments),
    )


def make_trainer(*callbacks, **arguments):
    defaults = {
        "max_steps": 3,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "limit_val_batches": 0,
    }
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet["accelerator"] = "cpu"
    return L.Trainer(
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **(defaults | quiet | arguments),
    )


class Recorder(L.Callback):
    """Records the loss of every training step, and the learning rate of its update."""

    def __init__(self):
        self.losses = []
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def fit(module, data=None, callbacks=(), **arguments):
    """Train a module; returns the recorder."""
    recorder = Recorder()
    make_trainer(recorder, *callbacks, **arguments).fit(module, datamodule=data or RandomImages())
    return recorder


@pytest.fixture(scope="module")
def trained_state():
    """Weights and statistics of a flow after six steps.

    It is no longer the identity, and its running statistics lag far behind.
    """
    module = density(lr=3e-3)
    fit(module, max_steps=6)
    return module.flow.state_dict()


@pytest.fixture
def trained(trained_state):
    flow = tiny_flow()
    flow.load_state_dict(trained_state)
    return flow.eval()


def bits_by_hand(flow, images, noise_seed=0):
    """Bits/dim of each image, (N,), by the formula, with noise keyed (noise seed, index, 0)."""
    u = [
        np.random.default_rng([noise_seed, i, 0]).random(SHAPE, dtype=np.float32)
        for i in range(len(images))
    ]
    x = (torch.from_numpy(images).float() + torch.from_numpy(np.stack(u))) / 256
    with torch.no_grad():
        return 8 - flow.log_prob(x) / (math.prod(SHAPE) * math.log(2))


def reestimated_by_hand(flow, data, n_batches):
    """A flow whose statistics are plain means over the first training batches of epoch 0.

    They are taken in training mode, with the noise of that epoch.
    """
    flow = copy.deepcopy(flow).train()
    layers = [m for m in flow.modules() if isinstance(m, _BatchNorm)]
    for layer in layers:
        layer.momentum = None
        layer.reset_running_stats()
    keys = list(TrainSampler(len(data.train), data.batch_size, data.seed))
    for i in range(n_batches):
        q = torch.stack(
            [data.train[key][0] for key in keys[i * data.batch_size : (i + 1) * data.batch_size]]
        )
        u = batch_noise(tuple(q.shape), data.seed, 0, i, torch.device("cpu"))
        with torch.no_grad():
            flow((q.float() + u) / 256)
    return flow.eval()


# ----------------------------------------------------------------------------- optimisation


def test_warm_up_is_linear_from_zero_per_iteration():
    steps = fit(density(lr=2e-3, warmup_steps=4), max_steps=7).rates
    assert steps == [2e-3 * (i / 4) for i in range(4)] + [2e-3] * 3


def test_cosine_after_the_warm_up_ends_at_zero():
    module = density(lr=2e-3, warmup_steps=2, schedule="cosine")
    recorder = Recorder()
    trainer = make_trainer(recorder, max_steps=10)
    trainer.fit(module, datamodule=RandomImages())
    cosine = [2e-3 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert recorder.rates == pytest.approx([0.0, 1e-3, *cosine], rel=1e-12)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize(
    ("cooldown", "expected"),
    [(4, [1, 1, 1, 1, 0.75, 0.5, 0.25]), (1, [1] * 7), (7, [1 - i / 7 for i in range(7)])],
)
def test_cooldown_is_linear_to_zero_in_the_last_steps(cooldown, expected):
    """The longest cooldown begins at the end of the warm-up."""
    module = density(Uniform(), lr=2e-3, warmup_steps=2, cooldown_steps=cooldown)
    recorder = Recorder()
    trainer = make_trainer(recorder, max_steps=9)
    trainer.fit(module, datamodule=RandomImages())
    assert recorder.rates == pytest.approx(
        [2e-3 * factor for factor in (0, 0.5, *expected)], rel=1e-12
    )
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0


def test_without_a_cooldown_the_rate_stays():
    assert fit(density(Uniform(), lr=2e-3, cooldown_steps=0), max_steps=5).rates == [2e-3] * 5


def test_a_cooldown_needs_a_constant_schedule():
    with pytest.raises(
        ValueError, match=r"optim\.cooldown_steps=3: a cosine ends at 0 by itself"
    ) as error:
        density(schedule="cosine", cooldown_steps=3)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"optim\.cooldown_steps=-1"):
        density(cooldown_steps=-1)
    with pytest.raises(
        ValueError, match=r"optim\.cooldown_steps=3 ends at the last step: set trainer\.max_steps"
    ):
        fit(density(Uniform(), cooldown_steps=3), max_steps=-1, max_epochs=1)


@pytest.mark.parametrize(
    "settings", [{"cooldown_steps": 7}, {"schedule": "cosine", "warmup_steps": 10}]
)
def test_a_cooldown_or_warm_up_longer_than_the_run_is_refused(settings):
    """A recipe with a cooldown becomes such a run when only `trainer.max_steps=` is given."""
    module = density(**({"warmup_steps": 3} | settings))
    module.trainer = SimpleNamespace(max_steps=9, precision_plugin=None)
    with pytest.raises(
        ValueError, match=r"are more than trainer\.max_steps=9: give .* optim\.warmup_steps=0"
    ) as error:
        module.configure_optimizers()
    assert "\n" not in str(error.value)


def scheduled(max_steps):
    """Optimizer and scheduler of a run of `max_steps`, whose last five steps are a cooldown."""
    module = density(Uniform(), lr=2e-3, warmup_steps=2, cooldown_steps=5)
    module.trainer = SimpleNamespace(max_steps=max_steps, precision_plugin=None)
    made = module.configure_optimizers()
    return made["optimizer"], made["lr_scheduler"]["scheduler"]


def rates(optimizer, scheduler, n):
    """The learning rates of the next n steps."""
    values = []
    for _ in range(n):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


@pytest.mark.parametrize("at", [3, 7, 10])
def test_a_resumed_run_falls_towards_the_end_that_is_given_now(at):
    """Checkpoints written before schedules became functions hold the old end; it is ignored."""
    whole = rates(*scheduled(40), 40)
    optimizer, scheduler = scheduled(10)
    begun = rates(optimizer, scheduler, at)
    falling = [2e-3 * ((10 - i) / 5) for i in range(6, 10)]
    assert begun == [*whole[:6], *falling][:at]
    for lambdas in (
        scheduler.state_dict()["lr_lambdas"],
        [{"steps": 2, "total": 10, "cooldown": 5}],
    ):
        longer, restored = scheduled(40)
        longer.load_state_dict(optimizer.state_dict())
        restored.load_state_dict(scheduler.state_dict() | {"lr_lambdas": lambdas})
        assert rates(longer, restored, 40 - at) == whole[at:]


def test_cosine_needs_a_last_step():
    with pytest.raises(ValueError, match=r"trainer\.max_steps"):
        fit(density(schedule="cosine"), max_steps=-1, max_epochs=1)


@pytest.mark.parametrize(
    ("name", "cls"), [("adam", torch.optim.Adam), ("adamax", Adamax), ("adamw", torch.optim.AdamW)]
)
def test_optimizer_by_name(name, cls):
    module = density(name=name, lr=2e-3, betas=[0.8, 0.95], weight_decay=0.01)
    module.trainer = SimpleNamespace(max_steps=10, precision_plugin=None)
    optimizer = module.configure_optimizers()["optimizer"]
    assert type(optimizer) is cls
    group = optimizer.param_groups[0]
    assert (group["initial_lr"], group["betas"], group["weight_decay"]) == (2e-3, (0.8, 0.95), 0.01)
    assert {id(p) for p in group["params"]} == {id(p) for p in module.flow.parameters()}
    assert len(fit(density(name=name), max_steps=2).losses) == 2


@pytest.mark.parametrize("argument", [{"name": "adamm"}, {"schedule": "linear"}])
def test_unknown_names(argument):
    [(key, value)] = argument.items()
    with pytest.raises(ValueError, match=f"optim.{key}={value} is not known: give one of") as error:
        density(**argument)
    assert "\n" not in str(error.value)


NOT_NEGATIVE = (-1.0, float("nan"), float("inf"), True)


@pytest.mark.parametrize(
    ("key", "values", "request_"),
    [
        ("lr", NOT_NEGATIVE, "give 0 or a positive number"),
        ("weight_decay", NOT_NEGATIVE, "give 0 or a positive number"),
        ("l2", NOT_NEGATIVE, "give 0 or a positive number"),
        ("clip_norm", (0, *NOT_NEGATIVE), "give a positive number, or null for no clipping"),
        ("warmup_steps", (-1, 1.5, True), "give a whole number of at least 0"),
        ("max_skipped", (-1, 1.5), "give a whole number of at least 0"),
        ("bn_images", (-1, 1.5), "give a whole number of at least 0"),
        ("noise_samples", (0, 1.5), "give a whole number from 1 to 100000"),
        ("noise_seed", (-1,), "give a whole number of at least 0"),
        ("seed", (-1,), "give a whole number of at least 0"),
    ],
)
def test_values_out_of_their_range_are_one_line_that_says_what_is_allowed(key, values, request_):
    for value in values:
        with pytest.raises(ValueError, match=rf"{key}={value} is out of range: ") as error:
            density(**{key: value})
        assert str(error.value).endswith(request_)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "betas", [{}, [], [0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, float("nan")], "ab", [0.9, True], 0.9]
)
def test_betas_that_are_not_two_shares_are_refused(betas):
    with pytest.raises(ValueError, match=r"^optim\.betas=.* are not two numbers from 0") as error:
        density(betas=OmegaConf.create(betas) if isinstance(betas, dict) else betas)
    assert "\n" not in str(error.value)


class Clipped(DensityModule):
    """Notes the gradients before and after clipping; Lightning calls its hook once a step."""

    def configure_gradient_clipping(self, *arguments, **more):
        before = gradients(self.flow)
        super().configure_gradient_clipping(*arguments, **more)
        self.noted = [*getattr(self, "noted", []), (before, gradients(self.flow))]


def gradients(flow):
    return torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipping_scales_the_global_norm(precision):
    module = density(cls=Clipped, clip_norm=0.5)
    fit(module, precision=precision)
    assert len(module.noted) == 3
    for before, after in module.noted:
        assert before.norm() > 1
        assert after.norm().item() == pytest.approx(0.5, rel=1e-4)
        assert torch.allclose(after, before * (0.5 / before.norm()), rtol=1e-4)


@pytest.mark.parametrize("clip_norm", [None, 1e9])
def test_nothing_is_clipped_below_the_threshold(clip_norm):
    module = density(cls=Clipped, clip_norm=clip_norm)
    fit(module)
    assert all(torch.equal(before, after) for before, after in module.noted)
    assert len(module.noted) == 3


def test_l2_is_added_to_the_nats():
    losses = {}
    for l2 in (0.0, 0.25):
        flow = tiny_flow()
        penalty = flow.l2_penalty().item()
        losses[l2] = fit(density(flow, l2=l2), max_steps=1).losses[0]
    assert penalty > 1
    assert losses[0.25] == pytest.approx(losses[0.0] + 0.25 * penalty, rel=1e-6)


def test_a_trial_is_a_loss_of_made_up_images_without_a_trainer():
    """The duration of a run is estimated by it; points have none."""
    module = density()
    point = density(RealNVP2d(hidden_channels=4), TwoMoons)
    loss = module.trial(4)
    loss.backward()
    assert 0 < loss.item() < 192 * 8
    assert all(p.grad is not None for p in module.flow.parameters())
    assert point.trial(4) is None


def test_a_trial_does_not_warn_that_the_flow_is_not_initialised():
    """It comes before the initialisation. A step that is trained without one does warn."""
    module = density(Glow(SHAPE, 2, 1, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UninitializedWarning)
        module.trial(4)
    with pytest.warns(UninitializedWarning, match="this Glow is trained without a start"):
        fit(density(Glow(SHAPE, 2, 1, 4)), max_steps=2)


def test_the_loss_is_the_mean_of_minus_log_p():
    data = RandomImages()
    flow = tiny_flow().train()
    q = torch.stack([data.train[key][0] for key in list(TrainSampler(64, 16, 0))[:16]])
    x = (q.float() + batch_noise((16, *SHAPE), 0, 0, 0, torch.device("cpu"))) / 256
    expected = -flow.log_prob(x).mean().item()
    module = density()
    recorder = Recorder()
    trainer = make_trainer(recorder, max_steps=1)
    trainer.fit(module, datamodule=data)
    assert recorder.losses[0] == pytest.approx(expected, rel=1e-6)
    bits = 8 + expected / (192 * math.log(2))
    assert trainer.callback_metrics["train/bpd"].item() == pytest.approx(bits, rel=1e-6)
    assert module.train_mean.compute().item() == pytest.approx(bits, rel=1e-6)


# ----------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("batch_size", [7, 16, 23])
def test_validation_is_a_mean_over_images(trained, batch_size):
    """23 images leave an incomplete batch of 2 or 7: a mean over batches would differ."""
    data = RandomImages(batch_size)
    by_hand = bits_by_hand(trained, data.val.images, noise_seed=3)
    [validated] = make_trainer(limit_val_batches=None).validate(
        density(trained, noise_seed=3), data, verbose=False
    )
    assert list(validated) == ["val/bpd"]
    assert validated["val/bpd"] == pytest.approx(by_hand.mean().item(), abs=2e-6)
    batch_means = [part.mean() for part in by_hand.split(batch_size)]
    if batch_size < 23:
        assert abs(torch.stack(batch_means).mean() - by_hand.mean()) > 1e-5


def test_evaluation_noise_seed_matters(trained):
    trainer = make_trainer(limit_val_batches=None)
    data = RandomImages()
    zero, again, one = (
        trainer.validate(density(trained, noise_seed=k), data, verbose=False)[0] for k in (0, 0, 1)
    )
    assert zero == again
    assert abs(zero["val/bpd"] - one["val/bpd"]) > 1e-6


def test_the_test_reports_running_and_reestimated_statistics(trained):
    data = RandomImages()
    before = copy.deepcopy(trained.state_dict())
    [tested] = make_trainer().test(density(trained), data, verbose=False)
    assert set(tested) == {"test/bpd", "test/bpd_reestimated"}
    running = bits_by_hand(trained, data.test.images).mean().item()
    fresh = reestimated_by_hand(trained, data, n_batches=3)  # 40 images: three batches of 16
    reestimated = bits_by_hand(fresh, data.test.images).mean().item()
    assert tested["test/bpd"] == pytest.approx(running, abs=2e-6)
    assert tested["test/bpd_reestimated"] == pytest.approx(reestimated, abs=2e-6)
    assert abs(running - reestimated) > 0.01
    assert before.keys() == trained.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())
    assert {m.momentum for m in trained.modules() if isinstance(m, _BatchNorm)} == {0.1}


def test_bn_images_zero_reports_running_statistics_only(trained):
    data = RandomImages()
    [tested] = make_trainer().test(density(trained, bn_images=0), data, verbose=False)
    assert list(tested) == ["test/bpd"]
    assert tested["test/bpd"] == pytest.approx(
        bits_by_hand(trained, data.test.images).mean().item(), abs=2e-6
    )


def test_no_validation_set():
    trainer = make_trainer(limit_val_batches=None, max_epochs=1)
    trainer.fit(density(), datamodule=RandomImages(n_val=0))
    assert trainer.global_step == 3
    assert not any(key.startswith("val/") for key in trainer.callback_metrics)


class Spied(RealNVP):
    """Notes of every pass, also of its copies, whether it trains, its autocast and its types."""

    seen: ClassVar[list] = []

    def forward(self, x, context=None):
        latents, log_det = super().forward(x, context)
        self.seen.append(
            (
                self.training,
                torch.is_autocast_enabled("cpu"),
                {t.dtype for t in (x, *latents, log_det)},
            )
        )
        return latents, log_det


def test_evaluation_is_float32_whatever_the_training_precision():
    data = RandomImages()
    flow = Spied(SHAPE, n_scales=1, hidden_channels=4, n_blocks=1)
    module = density(flow)
    seen = Spied.seen
    seen.clear()
    trainer = make_trainer(precision="bf16-mixed", limit_val_batches=None)
    trainer.fit(module, datamodule=data)
    assert [modes[:2] for modes in seen] == [(True, True)] * 3
    seen.clear()
    [validated] = trainer.validate(module, data, verbose=False)
    [tested] = trainer.test(module, data, verbose=False)
    # Two batches of validation, three of re-estimation, and two of the test for each of two flows.
    assert [modes[0] for modes in seen] == [False] * 2 + [True] * 3 + [False] * 4
    assert not any(autocast for _, autocast, _ in seen)
    assert all(dtypes == {torch.float32} for _, _, dtypes in seen)
    assert validated["val/bpd"] == pytest.approx(
        bits_by_hand(flow.eval(), data.val.images).mean().item(), abs=1e-6
    )
    fresh = reestimated_by_hand(flow, data, 3)
    by_hand = bits_by_hand(fresh, data.test.images).mean().item()
    assert tested["test/bpd_reestimated"] == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("allowed", [True, False])
def test_full_float32_puts_everything_back(allowed):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [b.allow_tf32 for b in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = allowed
        with torch.autocast("cpu", torch.bfloat16):
            with contextlib.suppress(KeyError), full_float32("cpu"):
                inside = [torch.is_autocast_enabled("cpu"), *(b.allow_tf32 for b in backends)]
                raise KeyError  # also after an error
            assert torch.is_autocast_enabled("cpu")
        assert inside == [False, False, False]
        assert [b.allow_tf32 for b in backends] == [allowed, allowed]
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


class Zero:
    def log_prob(self, latents):
        return torch.zeros(len(latents[0]))


class Uniform(FlowModel):
    """p(x) = 1 on the unit cube; its parameter changes nothing, and is for the optimizer."""

    base = Zero()

    def __init__(self):
        super().__init__()
        self.shape = SHAPE
        self.nothing = nn.Parameter(torch.ones(()))

    def latent_shapes(self, shape=None):
        return (SHAPE,)

    def forward(self, x, context=None):
        assert 0 <= x.min() <= x.max() < 1
        return (x,), 0 * self.nothing.expand(len(x))

    def inverse(self, z, context=None):
        return z[0], torch.zeros(len(z[0]))


def test_a_uniform_density_has_exactly_n_bits_per_dim():
    module = density(Uniform())
    data = RandomImages()
    trainer = make_trainer(limit_val_batches=None)
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["train/bpd"].item() == 8.0
    assert module.train_mean.compute().item() == 8.0
    assert trainer.validate(module, data, verbose=False) == [{"val/bpd": 8.0}]
    assert trainer.test(module, data, verbose=False) == [{"test/bpd": 8.0}]


def test_training_noise_is_that_of_the_epoch_and_batch():
    """The images are black, so the flow sees the noise alone."""
    data = RandomImages()
    seen = []
    data.train.images = np.zeros_like(data.train.images)
    flow = Uniform()
    flow.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0] * 256))
    fit(density(flow, seed=5), data, max_steps=10)  # four batches an epoch
    keys = [(epoch, batch) for epoch in range(3) for batch in range(4)][:10]
    for x, (epoch, batch) in zip(seen, keys, strict=True):
        assert torch.equal(x, batch_noise((16, *SHAPE), 5, epoch, batch, torch.device("cpu")))


def test_points_are_reported_in_nats():
    data = TwoMoons(batch_size=32, n_train=64, n_val=50, n_test=50)
    torch.manual_seed(0)
    flow = RealNVP2d(n_couplings=2, hidden_channels=8)
    module = density(flow, TwoMoons)
    trainer = make_trainer(limit_val_batches=None)
    trainer.fit(module, datamodule=data)
    assert not any("bpd" in key for key in trainer.callback_metrics)
    with torch.no_grad():
        nats = {
            split: -flow.log_prob(getattr(data, split).points).mean().item()
            for split in ("val", "test")
        }
    assert trainer.validate(module, data, verbose=False) == [
        {"val/nll": pytest.approx(nats["val"], abs=1e-6)}
    ]
    assert trainer.test(module, data, verbose=False) == [
        {"test/nll": pytest.approx(nats["test"], abs=1e-6)}
    ]


# ----------------------------------------------------------------------------- averaged weights


class ByHand(L.Callback):
    """Averages weights after every step with decay .5; the first step copies the weights."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = {k: p.detach().clone() for k, p in pl_module.flow.named_parameters()}
        first = not hasattr(self, "average")
        if not first:
            now = {k: 0.5 * (self.average[k] + v) for k, v in now.items()}
        self.average = now
        self.buffers = {k: b.clone() for k, b in pl_module.flow.named_buffers()}


def test_averaged_weights_are_evaluated_with_reestimated_statistics():
    data = RandomImages()
    average = ByHand()
    module = density(lr=3e-3)
    callbacks = average, EMAWeightAveraging(use_buffers=False, decay=0.5)
    trainer = make_trainer(
        *callbacks,
        max_steps=4,
        limit_val_batches=None,
        check_val_every_n_epoch=None,
        val_check_interval=4,
    )
    trainer.fit(module, datamodule=data)
    validated = trainer.callback_metrics["val/bpd"].item()
    [tested] = trainer.test(module, data, verbose=False)

    for key, parameter in module.flow.named_parameters():  # training ends with the average in place
        assert torch.allclose(parameter, average.average[key], rtol=1e-5, atol=1e-7)
    buffers = dict(module.flow.named_buffers())
    assert all(torch.equal(buffers[key], value) for key, value in average.buffers.items())
    counts = [b for key, b in buffers.items() if key.endswith("num_batches_tracked")]
    assert {(b.dtype, b.item()) for b in counts} == {(torch.int64, 4)}

    fresh = reestimated_by_hand(module.flow, data, 3)
    assert list(tested) == ["test/bpd"]
    assert tested["test/bpd"] == pytest.approx(
        bits_by_hand(fresh, data.test.images).mean().item(), abs=1e-6
    )
    assert validated == pytest.approx(bits_by_hand(fresh, data.val.images).mean().item(), abs=1e-6)
    running = bits_by_hand(module.flow.eval(), data.test.images).mean().item()
    assert abs(running - tested["test/bpd"]) > 0.01


def test_averaging_does_not_touch_the_training():
    averaged = fit(
        density(),
        callbacks=[EMAWeightAveraging(use_buffers=False, decay=0.5)],
        max_steps=6,
        limit_val_batches=None,
        check_val_every_n_epoch=None,
        val_check_interval=2,
    )
    assert averaged.losses == fit(density(), max_steps=6).losses


# ----------------------------------------------------------------------------- estimates, autograd


class Estimated(FlowModel):
    """x + a, whose log-determinant of 0 is estimated as 10 (mean of the noise - 1/2).

    It keeps the noises that it was handed.
    """

    noise_shape = (2, 5)

    def __init__(self):
        super().__init__()
        self.shape = SHAPE
        self.a = nn.Parameter(torch.zeros(()))
        self.noises = []

    def latent_shapes(self, shape=None):
        return (SHAPE,)

    def forward(self, x, context=None, noise=None):
        self.noises.append(noise)
        return (x + self.a,), 10 * (noise.flatten(1).mean(1) - 0.5)

    def inverse(self, z, context=None, noise=None):
        return z[0] - self.a, torch.zeros(len(z[0]))

    def log_prob(self, x, context=None, noise=None):
        latents, log_det = self(x, context, noise)
        return self.base.log_prob(latents) + log_det


def test_an_estimate_is_called_one_and_depends_on_the_image_alone():
    data = RandomImages(batch_size=7)
    flow = Estimated()
    [tested] = make_trainer().test(density(flow, noise_seed=3), data, verbose=False)
    assert list(tested) == ["test/bpd_estimate"]
    noise = [
        np.random.default_rng([3, i, 0, 1]).random((2, 5), dtype=np.float32) for i in range(23)
    ]
    assert np.array_equal(torch.cat(flow.noises), np.stack(noise))
    exact = bits_by_hand(
        SimpleNamespace(log_prob=lambda x: flow.base.log_prob((x,))), data.test.images, 3
    )
    nats = 10 * (np.stack(noise).mean((1, 2)) - 0.5)
    expected = (exact.numpy() - nats / (192 * math.log(2))).mean()
    assert tested["test/bpd_estimate"] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(("ranks", "n_micro"), [(1, 1), (2, 1), (2, 2)])
def test_the_noise_of_an_estimate_is_a_function_of_the_global_batch(ranks, n_micro):
    """Ranks and micro-batches take slices of it, and dequantisation has the noise as without it."""
    module = density(Estimated(), seed=5)
    plain = density(seed=5)
    parts = ranks * n_micro
    q = torch.from_numpy(RandomImages().train.images[:16])
    inputs = []
    for rank in range(ranks):
        for micro in range(n_micro):
            trainer = SimpleNamespace(
                world_size=ranks, global_rank=rank, accumulate_grad_batches=n_micro, current_epoch=2
            )
            module.trainer = plain.trainer = trainer
            at = module.position(3 * n_micro + micro)
            piece = [q[(rank * n_micro + micro) * 16 // parts :][: 16 // parts]]
            inputs.append(module.training_input(piece, at))
            assert torch.equal(inputs[-1].x, plain.training_input(piece, at).x)
            assert inputs[-1].arguments[2] is inputs[-1].noise
    key = np.random.SeedSequence([5, 2, 3, 1]).generate_state(1)[0]
    whole = torch.rand((16, 2, 5), generator=torch.Generator().manual_seed(int(key)))
    assert torch.equal(torch.cat([part.noise for part in inputs]), whole)


def test_several_samples_of_an_estimate_are_no_bound():
    """The mean of exp of an estimate is too large."""
    with pytest.raises(ValueError, match=r"eval\.noise_samples=8, but bpd_estimate is not a bound"):
        density(Estimated(), noise_samples=8)


class ByAutograd(FlowModel):
    """x + x^3, whose log-determinant is taken by autograd."""

    needs_autograd = True

    def __init__(self):
        super().__init__()
        self.shape = SHAPE
        self.a = nn.Parameter(torch.ones(()))

    def latent_shapes(self, shape=None):
        return (SHAPE,)

    def forward(self, x, context=None):
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        z = x + self.a * x**3
        (slope,) = torch.autograd.grad(z.sum(), x, create_graph=True)
        return (z,), slope.log().flatten(1).sum(1)

    def inverse(self, z, context=None):
        x = z[0].detach()
        for _ in range(50):
            x = x - (x + self.a * x**3 - z[0]) / (1 + 3 * self.a * x**2)
        return x, -self(x)[1]


class Seen(L.Callback):
    """Notes whether the means of a test have a graph, and in which modes they are taken."""

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        mean = pl_module.eval_means["bpd"]
        self.kept = (
            mean.mean_value.requires_grad,
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
        )


def test_a_flow_whose_evaluation_takes_gradients_gets_them(tmp_path):
    """`make_trainer` turns inference mode off, and the means of a test keep no graph."""
    data = RandomImages()
    module = density(ByAutograd())
    config = compose("realnvp_cifar10", [*TINY, f"run_dir={tmp_path}"])
    seen = Seen()
    trainer = experiment.make_trainer(config, module, seen)
    [tested] = trainer.test(module, data, verbose=False)
    assert seen.kept == (False, False, False)
    u = [np.random.default_rng([0, i, 0]).random(SHAPE, dtype=np.float32) for i in range(23)]
    x = (torch.from_numpy(data.test.images) + torch.from_numpy(np.stack(u))) / 256
    by_hand = module.flow.base.log_prob((x + x**3,)) + (1 + 3 * x**2).log().flatten(1).sum(1)
    assert tested["test/bpd"] == pytest.approx(
        (8 - by_hand / (192 * math.log(2))).mean().item(), abs=2e-6
    )
    batch = [torch.from_numpy(data.val.images[:4]), torch.arange(4)]
    with torch.no_grad():
        original, again = module.reconstruct(batch)
        samples = module.draw(3, 0.7, 0)
    torch.testing.assert_close(original, again, atol=1e-5, rtol=0)
    assert not any(t.requires_grad for t in (original, again, samples))
    other = Seen()
    exact = experiment.make_trainer(config, density(tiny_flow()), other)
    exact.test(density(tiny_flow(), bn_images=0), data, verbose=False)
    assert other.kept == (False, True, False)


# ----------------------------------------------------------------------------- resuming


def run(folder, ema, checkpoint=None):
    """Ten steps in epochs of six, validated every three steps, and saved after every step.

    Returns the losses, the final weights and the last val/bpd.
    """
    recorder = Recorder()
    module = density(lr=3e-3, warmup_steps=5, schedule="cosine")
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [recorder, saver]
    if ema:
        callbacks.insert(1, EMAWeightAveraging(use_buffers=False, decay=0.9))
    trainer = make_trainer(
        *callbacks,
        max_steps=10,
        enable_checkpointing=True,
        limit_val_batches=None,
        check_val_every_n_epoch=None,
        val_check_interval=3,
    )
    trainer.fit(
        module, datamodule=RandomImages(n_train=100), ckpt_path=checkpoint, weights_only=True
    )
    return recorder.losses, module.flow.state_dict(), trainer.callback_metrics.get("val/bpd")


@pytest.fixture(scope="module", params=[False, True], ids=["raw", "ema"])
def uninterrupted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, request.param, *run(folder, request.param)


@pytest.mark.parametrize("step", [4, 6, 7, 9])
def test_a_killed_run_goes_on_bit_for_bit(uninterrupted, tmp_path, step):
    """From the middle and the end (6) of an epoch.

    After the checkpoints of steps 6 and 9 a validation is due at once.
    """
    folder, ema, losses, weights, validated = uninterrupted
    assert len(set(losses)) == 10
    later, resumed, validated_later = run(tmp_path, ema, folder / f"step={step}.ckpt")
    assert later == losses[step:]
    assert resumed.keys() == weights.keys()
    assert all(torch.equal(resumed[key], value) for key, value in weights.items())
    assert step == 9 or validated_later == validated
