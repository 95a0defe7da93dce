"""Glow given the class.

The flow's context, and the module's loss, likelihood and accuracy under a real Trainer.
"""

import math
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from cases import perturb
from test_density import SHAPE, RandomImages, Recorder, bits_by_hand, density, make_trainer
from torch.nn import functional as F

from datamodules.images import ImageArray
from datamodules.samplers import TrainSampler
from flows.base import FlowModel
from flows.context import Classes
from flows.glow import Glow
from flows.normalization import CouplingBatchNorm
from lightning_modules.class_conditional import ClassConditionalModule
from lightning_modules.noise import Position, batch_noise

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in (
        "does not have many workers",
        "LeafSpec.* is deprecated",
        "The dirpath has changed",
        "Total length of",
    )
]
N_CLASSES = 3


def fresh(**arguments):
    """A flow that is not yet initialised, float32."""
    torch.manual_seed(0)
    return Glow(
        SHAPE,
        **({"n_levels": 2, "depth": 1, "hidden_channels": 4, "n_classes": N_CLASSES} | arguments),
    )


def perturbed():
    """A flow all of whose weights were moved, so that class and classifier matter.

    In float64 and eval mode.
    """
    return perturb(fresh(), 0.05).double().eval()


def images(n, seed=0):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*classes):
    return torch.tensor(classes)


class LabelledImages(RandomImages):
    """The same images, whose classes are i mod 3, moved on by one after every fifth image."""

    n_classes = N_CLASSES
    labels = True

    def __init__(self, **arguments):
        super().__init__(**arguments)
        for split in (self.train, self.val, self.test):
            split.labels = np.array([(i + i // 5) % N_CLASSES for i in range(len(split))])


def conditional(flow, data=LabelledImages, **arguments):
    return density(flow, data, ClassConditionalModule, **arguments)


def assert_close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# ----------------------------------------------------------------------------- the flow


def test_the_class_makes_no_difference_before_training():
    flow = fresh().double()
    x = images(3)
    unconditional = fresh(n_classes=None).double()
    unconditional.load_state_dict(
        {k: v for k, v in flow.state_dict().items() if k in unconditional.state_dict()}
    )
    for y in range(N_CLASSES):
        assert torch.equal(flow.log_prob(x, labels(y, y, y)), unconditional.log_prob(x))


def test_the_class_moves_mean_and_scale_of_the_last_level_alone():
    flow = perturbed()
    x = images(4)
    (lower, top), log_det = flow(x, labels(0, 0, 0, 0))
    (lower_1, top_1), log_det_1 = flow(x, labels(0, 1, 2, 1))
    assert torch.equal(lower, lower_1)
    same = torch.tensor([True, False, False, False])
    assert torch.equal((top == top_1).flatten(1).all(1), same)
    by_class = flow.prior.by_class
    # A row for each class: means, then log-deviations.
    rows = (by_class.weight.T + by_class.bias) * (3 * by_class.log_scale).exp()
    log_std = rows[:, 24:].sum(1) * 2 * 2  # over the 24 channels of 2x2
    assert_close(log_det_1 - log_det, log_std[0] - log_std[[0, 1, 2, 1]])
    assert (log_det_1 - log_det)[1:].abs().min() > 1e-3
    assert (
        flow.log_prob(x, labels(0, 1, 2, 1))[1:].ne(flow.log_prob(x, labels(0, 0, 0, 0))[1:]).all()
    )


def test_a_conditional_flow_inverts_given_the_class():
    flow = perturbed()
    x = images(4)
    y = labels(2, 0, 1, 1)
    latents, log_det = flow(x, y)
    back, inverse_log_det = flow.inverse(latents, y)
    assert_close(back, x)
    assert_close(inverse_log_det, -log_det)
    assert (flow.inverse(latents, labels(0, 0, 1, 1))[0] - x)[0].abs().max() > 1e-3


CALLS = {
    "log_prob": lambda flow, x, z: flow.log_prob(x),
    "inverse": lambda flow, x, z: flow.inverse(z),
    "sample": lambda flow, x, z: flow.sample(2),
    "logits": lambda flow, x, z: flow.log_prob_and_class_logits(x, None),
}


@pytest.mark.parametrize("call", CALLS)
def test_without_the_class_it_is_an_error_of_one_line(call):
    flow = perturbed()
    x = images(2)
    z, _ = flow(x, labels(0, 1))
    with pytest.raises(
        ValueError, match=r"class-conditional: give the classes as context, \(B,\) int64"
    ) as error:
        CALLS[call](flow, x, z)
    assert "\n" not in str(error.value)


def test_samples_have_a_row_for_each_class_given():
    """(n, B, *shape): sample i of class b is the inverse of base sample i B + b."""
    flow = perturbed()
    y = labels(2, 0)
    n = 3
    samples = flow.sample(n, 0.8, y, generator=torch.Generator().manual_seed(4))
    assert samples.shape == (n, 2, *SHAPE)
    generator = torch.Generator().manual_seed(4)
    eps = [
        torch.randn(n * 2, *shape, generator=generator, dtype=torch.float64)
        for shape in flow.latent_shapes()
    ]
    for i in range(n):
        for b in range(2):
            latents = tuple(0.8 * level[2 * i + b][None] for level in eps)
            assert_close(samples[i, b], flow.inverse(latents, y[b : b + 1])[0][0])


def test_every_class_has_a_mean_of_its_own():
    flow = perturbed()
    means = flow.sample(2, 0.0, labels(0, 1, 2))
    assert_close(means[0], means[1])
    assert (means[0, 0] - means[0, 1]).abs().max() > 1e-3
    assert (means[0, 1] - means[0, 2]).abs().max() > 1e-3


def test_logits_are_linear_in_the_mean_of_the_last_level_and_do_not_know_the_class():
    flow = perturbed()
    x = images(4)
    log_prob, logits = flow.log_prob_and_class_logits(x, labels(0, 0, 0, 0))
    other_log_prob, other = flow.log_prob_and_class_logits(x, labels(2, 1, 2, 1))
    assert_close(logits, other)
    assert not torch.equal(log_prob, other_log_prob)
    assert_close(log_prob, flow.log_prob(x, labels(0, 0, 0, 0)))
    y = labels(0, 1, 2, 0)
    latents, _ = flow(x, y)
    top, _ = flow.prior.inverse(latents[-1], y)  # the last level before its prior
    linear = flow.classifier
    expected = (top.mean((2, 3)) @ linear.weight.T + linear.bias) * (3 * linear.log_scale).exp()
    assert_close(logits, expected)


# ----------------------------------------------------------------------------- the module


def first_step(data):
    """The dequantised images and the classes of the first training batch."""
    items = [data.train[key] for key in list(TrainSampler(64, 16, 0))[:16]]
    q = torch.stack([item[0] for item in items])
    y = torch.tensor([item[2] for item in items])
    return (q.float() + batch_noise((16, *SHAPE), 0, 0, 0, torch.device("cpu"))) / 256, y


@pytest.mark.parametrize("weight", [0.01, 0.5, 0.0])
def test_the_loss_is_nats_and_a_cross_entropy_per_dimension(weight):
    """An added .01 bits per dimension for a bit of cross entropy are .01 D CE nats an image."""
    data = LabelledImages()
    flow = perturb(fresh(), 0.05)
    x, y = first_step(data)
    log_prob, logits = flow.log_prob_and_class_logits(x, y)
    nats = -log_prob.mean().item()
    cross_entropy = F.cross_entropy(logits, y).item()
    by_hand = -torch.log_softmax(logits, 1)[torch.arange(16), y].mean().item()
    assert cross_entropy == pytest.approx(by_hand, rel=1e-5)
    assert abs(cross_entropy - math.log(N_CLASSES)) > 1e-3
    recorder = Recorder()
    trainer = make_trainer(recorder, max_steps=1)
    trainer.fit(conditional(flow, class_weight=weight), datamodule=data)
    assert recorder.losses[0] == pytest.approx(nats + weight * 192 * cross_entropy, rel=1e-6)
    bits = 8 + nats / (192 * math.log(2))  # without the class term
    assert trainer.callback_metrics["train/bpd"].item() == pytest.approx(bits, rel=1e-6)
    assert trainer.callback_metrics["train/class_loss"].item() == pytest.approx(
        cross_entropy, rel=1e-5
    )


def test_the_default_weight_is_the_authors():
    assert conditional(fresh()).class_weight == 0.01


def test_bpd_is_that_of_x_given_its_class():
    data = LabelledImages()
    flow = perturb(fresh(), 0.05)
    [validated] = make_trainer(limit_val_batches=None).validate(
        conditional(flow), data, verbose=False
    )
    assert set(validated) == {"val/bpd", "val/accuracy"}
    y = torch.from_numpy(data.val.labels)
    right, wrong = (
        bits_by_hand(
            SimpleNamespace(log_prob=lambda x, y=classes: flow.log_prob(x, y)), data.val.images
        )
        .mean()
        .item()
        for classes in (y, (y + 1) % N_CLASSES)
    )
    assert validated["val/bpd"] == pytest.approx(right, abs=1e-6)
    assert abs(right - wrong) > 1e-4


@pytest.mark.parametrize("answer", range(N_CLASSES))
def test_accuracy_of_a_classifier_that_always_says_the_same(answer):
    """It is the share of that class among 23 images, in batches of 16 and 7, in the test too."""
    data = LabelledImages()
    flow = fresh()
    with torch.no_grad():
        flow.classifier.bias[answer] = 1.0
    share = (data.val.labels == answer).mean()
    trainer = make_trainer(limit_val_batches=None)
    [validated] = trainer.validate(conditional(flow), data, verbose=False)
    [tested] = trainer.test(conditional(flow), data, verbose=False)
    assert validated["val/accuracy"] == pytest.approx(share, abs=1e-6)
    assert tested["test/accuracy"] == pytest.approx((data.test.labels == answer).mean(), abs=1e-6)
    assert set(tested) == {"test/bpd", "test/accuracy"}


def test_accuracy_by_hand():
    """A linear map of the mean tells bright images, of class 2, from dark ones, of class 0.

    Two of the 23 images are of class 1, and are classified wrongly.
    """
    data = LabelledImages()
    flow = fresh(n_levels=1, permutation="reverse", coupling="additive")
    levels = np.where(np.arange(23) % 2, 200, 30).astype(np.uint8)
    data.val = ImageArray(np.broadcast_to(levels[:, None, None, None], (23, *SHAPE)).copy())
    data.val.labels = np.where(np.arange(23) % 2, 2, 0)
    data.val.labels[[3, 8]] = 1
    with torch.no_grad():
        flow.classifier.weight[2] = 1.0  # the flow is the identity on x - 1/2
        flow.classifier.bias[1] = -100.0
    [validated] = make_trainer(limit_val_batches=None).validate(
        conditional(flow), data, verbose=False
    )
    assert validated["val/accuracy"] == pytest.approx(21 / 23, abs=1e-6)


class NormedFlow(FlowModel):
    """One batch norm as a flow, of images to which the class is added, with a classifier.

    It says that an image is of class 0 where its first latent is positive, and else of class 1.
    """

    conditioned_on = Classes(N_CLASSES)

    def __init__(self):
        super().__init__()
        self.shape = SHAPE
        self.norm = CouplingBatchNorm(3)

    def latent_shapes(self, shape=None):
        return (SHAPE,)

    def forward(self, x, context=None):
        z, log_det = self.norm(x + context[:, None, None, None])
        return (z,), log_det

    def inverse(self, z, context=None):
        x, log_det = self.norm.inverse(z[0])
        return x - context[:, None, None, None], log_det

    def log_prob_and_class_logits(self, x, context):
        latents, log_det = self(x, context)
        first = latents[0][:, 0, 0, 0]
        return self.base.log_prob(latents) + log_det, torch.stack(
            [first, 0 * first, first - 1e9], 1
        )


def test_every_image_counts_once_and_reestimated_statistics_have_an_accuracy_of_their_own():
    """23 images in batches of 16 and 7, evaluated with two sets of statistics in one pass."""
    data = LabelledImages()
    module = conditional(NormedFlow(), bn_images=64)
    counts = {}

    class Count(L.Callback):
        def on_test_end(self, trainer, pl_module):
            counts.update({name: mean.weight.item() for name, mean in means_of(pl_module).items()})

    [tested] = make_trainer(Count()).test(module, data, verbose=False)
    assert set(tested) == {
        "test/bpd",
        "test/bpd_reestimated",
        "test/accuracy",
        "test/accuracy_reestimated",
    }
    q = torch.from_numpy(data.test.images)
    y = torch.from_numpy(data.test.labels)
    x = module.input_of([q, torch.arange(23)]).x
    shares = {}
    for name, flow in (
        ("", module.flow.eval()),
        ("_reestimated", by_all_of_the_training(data, module)),
    ):
        with torch.no_grad():
            _, logits = flow.log_prob_and_class_logits(x, y)
        shares[f"test/accuracy{name}"] = (logits.argmax(1) == y).double().mean().item()
    assert len(set(shares.values())) == 2
    assert {name: tested[name] for name in shares} == pytest.approx(shares, abs=1e-6)
    assert counts == dict.fromkeys(counts, 23)
    assert len(counts) == 4


def means_of(module):
    """The means over images that a module logs, by name."""
    return dict(module.eval_means)


def by_all_of_the_training(data, module):
    """The same flow with the statistics of epoch 0, given each image's class."""
    flow = NormedFlow()
    batches = list(data.train_batches(64))
    for number, batch in enumerate(batches):
        x = module.training_input(batch, Position(0, number)).x + batch[2][:, None, None, None]
        flow.norm.running_mean += x.mean((0, 2, 3)) / len(batches)
        flow.norm.running_var += x.var((0, 2, 3), correction=0) / len(batches)
    flow.norm.running_var -= 1  # its initial value
    return flow.eval()


def test_a_flow_without_classes_is_refused():
    with pytest.raises(
        ValueError, match=r"this Glow has no classes: give flow\.n_classes"
    ) as error:
        conditional(fresh(n_classes=None))
    assert "\n" not in str(error.value)


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match=r"optim\.class_weight=-0\.1 is out of range"):
        conditional(fresh(), class_weight=-0.1)


def test_the_classifier_learns_the_class():
    """Images are bright or dark by class; a few steps of the classifier alone are enough."""
    data = LabelledImages()
    data.train.labels = (data.train.images.mean((1, 2, 3)) > data.train.images.mean()).astype(int)
    data.train.images[data.train.labels == 1] += 60
    data.val = data.train
    flow = fresh()
    with torch.no_grad():
        flow.initialize(first_step(data)[0])
    for name, parameter in flow.named_parameters():
        parameter.requires_grad_("classifier" in name)
    trainer = make_trainer(
        max_steps=20, limit_val_batches=None, check_val_every_n_epoch=None, val_check_interval=4
    )
    trainer.fit(conditional(flow, lr=0.1), datamodule=data)
    assert trainer.callback_metrics["val/accuracy"].item() == 1.0
    assert trainer.callback_metrics["train/class_loss"].item() < 0.5
