"""Glow against its authors' code: a plain reference model, initialisation, depth, first steps."""

import copy
import itertools
import math
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from cases import flat, perturb
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from test_density import SHAPE, RandomImages, Recorder, density, make_trainer
from test_resume import same
from torch.nn import functional as F

from datamodules.dequantization import UniformDequantizer
from datamodules.samplers import TrainSampler
from flows.coupling import AdditiveCoupling, SigmoidCoupling
from flows.glow import Glow
from flows.glow.priors import TopPrior
from flows.likelihood import bits_per_dim
from flows.linear import InvertibleConv1x1LU
from flows.normalization import ActNorm, uninitialized
from lightning_modules.callbacks.initialization import Initialization
from lightning_modules.density import DensityModule
from lightning_modules.noise import batch_noise
from reproduce import glow_photos

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in (
        "does not have many workers",
        "LeafSpec.* is deprecated",
        "The dirpath has changed",
        "Total length of",
    )
]


# ---------------------------------------------------------------------- the authors' model


class ReferenceGlow:
    """openai/glow's model.py and tfops.py by their formulas, without any code of ours.

    weights: tensors by name, "level/step/...". Names and layout are those of the code: the means
        and scales of a convolution alternate, and the edge channel is the last of its input. Only
        the axes are in torch's order, (out, in, height, width).
    initializing: every actnorm sets its own weights from its batch.
    """

    def __init__(self, weights, n_levels, depth, coupling, edges, initializing=False):
        self.weights = weights
        self.n_levels = n_levels
        self.depth = depth
        self.coupling = coupling
        self.edges = edges
        self.initializing = initializing

    def bits(self, x, n_bits, y=None):
        """Bits per dimension, (B,), and the mean over space of the last level, (B, C).

        x: (q + u) / 2^n_bits. y: the classes, or None.
        """
        n_dims = x[0].numel()
        objective = torch.full((len(x),), -math.log(2**n_bits) * n_dims, dtype=x.dtype)
        z = x - 0.5
        for i in range(self.n_levels):
            z = squeeze(z)
            for k in range(self.depth):
                z, log_det = self.step(f"{i}/{k}", z)
                objective = objective + log_det
            if i < self.n_levels - 1:
                z, z2 = halves(z)
                objective = objective + log_normal(z2, *self.split_prior(i, z))
        objective = objective + log_normal(z, *self.top_prior(z.shape, z.dtype, y))
        return -objective / (math.log(2) * n_dims), z.mean((2, 3))

    def decode(self, eps, temperature=1.0, y=None):
        """x from one eps for each level.

        A latent is mean + temperature * sigma * eps, with the mean and sigma of its prior.
        """
        mean, logs = self.top_prior(eps[-1].shape, eps[-1].dtype, y)
        z = mean + temperature * logs.exp() * eps[-1]
        for i in reversed(range(self.n_levels)):
            if i < self.n_levels - 1:
                mean, logs = self.split_prior(i, z)
                z = torch.cat([z, mean + temperature * logs.exp() * eps[i]], 1)
            for k in reversed(range(self.depth)):
                z = self.step_back(f"{i}/{k}", z)
            z = unsqueeze(z)
        return z + 0.5

    def step(self, name, z):
        z, log_det = self.actnorm(f"{name}/actnorm", z)
        z, permutation_log_det = self.permute(name, z)
        log_det = log_det + permutation_log_det
        z1, z2 = halves(z)
        h = self.f(f"{name}/f1", z1)
        if self.coupling == "additive":
            return torch.cat([z1, z2 + h], 1), log_det
        shift = h[:, 0::2]
        scale = torch.sigmoid(h[:, 1::2] + 2)
        log_det = log_det + scale.log().sum((1, 2, 3))
        return torch.cat([z1, (z2 + shift) * scale], 1), log_det

    def step_back(self, name, z):
        z1, z2 = halves(z)
        h = self.f(f"{name}/f1", z1)
        if self.coupling == "additive":
            z2 = z2 - h
        else:
            z2 = z2 / torch.sigmoid(h[:, 1::2] + 2) - h[:, 0::2]
        z = torch.cat([z1, z2], 1)
        if f"{name}/order" in self.weights:
            order = self.weights[f"{name}/order"]
            z = z.clone()
            z[:, order] = z.clone()
        else:
            inverse = torch.linalg.inv(self.weights[f"{name}/invconv/W"])
            z = torch.einsum("ij,bjhw->bihw", inverse, z)
        b = self.weights[f"{name}/actnorm/b"]
        logs = self.weights[f"{name}/actnorm/logs"]
        return z * column((-3 * logs).exp()) - column(b)

    def permute(self, name, z):
        if f"{name}/order" in self.weights:
            return z[:, self.weights[f"{name}/order"]], 0.0
        w = self.weights[f"{name}/invconv/W"]
        log_det = z.shape[2] * z.shape[3] * torch.linalg.slogdet(w).logabsdet
        return torch.einsum("ij,bjhw->bihw", w, z), log_det

    def f(self, name, z):
        h = self.actnorm(f"{name}/l_1/actnorm", self.conv(f"{name}/l_1", z))[0].relu()
        h = torch.einsum("ij,bjhw->bihw", self.weights[f"{name}/l_2/W"], h)
        h = self.actnorm(f"{name}/l_2/actnorm", h)[0].relu()
        return self.conv_zeros(f"{name}/l_last", h)

    def actnorm(self, name, x):
        if self.initializing:
            self.weights[f"{name}/b"] = -x.mean((0, 2, 3))
            std = (x + column(self.weights[f"{name}/b"])).square().mean((0, 2, 3)).sqrt()
            self.weights[f"{name}/logs"] = (1 / (std + 1e-6)).log() / 3
        logs = 3 * self.weights[f"{name}/logs"]
        y = (x + column(self.weights[f"{name}/b"])) * column(logs.exp())
        return y, x.shape[2] * x.shape[3] * logs.sum()

    def conv(self, name, x):
        """A 3x3 convolution of the padded image with one more channel.

        That channel is 1 on the padding and 0 inside.
        """
        batch, _, height, width = x.shape
        x = F.pad(x, (1, 1, 1, 1))
        if self.edges:
            pad = torch.ones(batch, 1, height + 2, width + 2, dtype=x.dtype)
            pad[:, :, 1:-1, 1:-1] = 0
            x = torch.cat([x, pad], 1)
        return F.conv2d(x, self.weights[f"{name}/W"])

    def conv_zeros(self, name, x):
        h = self.conv(name, x) + column(self.weights[f"{name}/b"])
        return h * column((3 * self.weights[f"{name}/logs"]).exp())

    def linear_zeros(self, name, x):
        h = x @ self.weights[f"{name}/W"].T + self.weights[f"{name}/b"]
        return h * (3 * self.weights[f"{name}/logs"]).exp()

    def split_prior(self, i, z1):
        h = self.conv_zeros(f"pool{i}/conv", z1)
        return h[:, 0::2], h[:, 1::2]

    def top_prior(self, shape, dtype, y):
        batch, channels, height, width = shape
        h = self.conv_zeros("prior/p", torch.zeros(batch, 2 * channels, height, width, dtype=dtype))
        if y is not None:
            n_classes = self.weights["prior/y_emb/W"].shape[1]
            one_hot = torch.eye(n_classes, dtype=dtype)[y]
            h = h + column(self.linear_zeros("prior/y_emb", one_hot))
        # Mean and scale are halves here; in the prior of a split they alternate.
        return h[:, :channels], h[:, channels:]


def squeeze(x):
    """Channel c, row dy and column dx of a 2x2 block become channel 4c + 2dy + dx."""
    batch, c, h, w = x.shape
    return (
        x.reshape(batch, c, h // 2, 2, w // 2, 2)
        .permute(0, 1, 3, 5, 2, 4)
        .reshape(batch, 4 * c, h // 2, w // 2)
    )


def unsqueeze(x):
    batch, c, h, w = x.shape
    return (
        x.reshape(batch, c // 4, 2, 2, h, w)
        .permute(0, 1, 4, 2, 5, 3)
        .reshape(batch, c // 4, 2 * h, 2 * w)
    )


def halves(x):
    return x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]


def column(per_channel):
    """(..., C) to (..., C, 1, 1)."""
    return per_channel[..., None, None]


def log_normal(z, mean, logs):
    return (-0.5 * (math.log(2 * math.pi) + 2 * logs + (z - mean) ** 2 / (2 * logs).exp())).sum(
        (1, 2, 3)
    )


def authors_weights(flow):
    """The weights of our Glow under the authors' names and in their layout, differentiably.

    The reference knows our code by this function alone.
    """
    weights = {}
    for i, level in enumerate(flow.levels):
        steps = list(level.layers[1].layers)
        for k in range(len(steps) // 3):
            actnorm, permutation, coupling = steps[3 * k : 3 * k + 3]
            f = coupling.conditioner
            name = f"{i}/{k}"
            weights |= actnorm_weights(f"{name}/actnorm", actnorm)
            weights |= permutation_weights(name, permutation)
            weights[f"{name}/f1/l_1/W"] = with_edge(f.conv_in.weight, f.conv_in.edge)
            weights |= actnorm_weights(f"{name}/f1/l_1/actnorm", f.norm_in)
            weights[f"{name}/f1/l_2/W"] = f.conv_mid.weight[:, :, 0, 0]
            weights |= actnorm_weights(f"{name}/f1/l_2/actnorm", f.norm_mid)
            weights |= zeros_weights(f"{name}/f1/l_last", f.conv_out, LAYOUTS[type(coupling)])
        if i < len(flow.levels) - 1:
            weights |= zeros_weights(f"pool{i}/conv", level.layers[2].net, alternate)
    top = flow.prior
    # Any weights will do for the convolution, since its input is 0.
    n = len(top.shift)
    zeros = torch.zeros(n, n, 3, 3, dtype=top.shift.dtype)
    weights["prior/p/W"] = with_edge(zeros, top.edge)
    weights |= {"prior/p/b": top.shift[:, 0, 0], "prior/p/logs": top.log_scale[:, 0, 0]}
    for name, linear in (("prior/y_emb", top.by_class), ("classifier", flow.classifier)):
        if linear is not None:
            weights |= {
                f"{name}/W": linear.weight,
                f"{name}/b": linear.bias,
                f"{name}/logs": linear.log_scale,
            }
    return weights


def actnorm_weights(name, layer):
    return {f"{name}/b": layer.bias[:, 0, 0], f"{name}/logs": layer.log_scale[:, 0, 0]}


def permutation_weights(name, layer):
    if hasattr(layer, "order"):
        return {f"{name}/order": layer.order}
    if isinstance(layer, InvertibleConv1x1LU):
        return {f"{name}/invconv/W": lu_product(layer)}
    return {f"{name}/invconv/W": layer.weight}


def lu_product(layer):
    """P (L + I) (U + diag(sign e^s)), with each factor written element by element."""
    n = len(layer.sign)
    zero = torch.zeros((), dtype=layer.sign.dtype)
    row, col = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    lower = torch.where(row > col, layer.lower, (row == col).to(zero.dtype))
    upper = torch.where(row < col, layer.upper, zero)
    diagonal = layer.sign * layer.log_scale.exp()
    upper = torch.where(row == col, diagonal[:, None], upper)
    return layer.permutation @ lower @ upper


def zeros_weights(name, layer, layout):
    weights = {
        "W": with_edge(layer.weight, layer.edge),
        "b": layer.shift[:, 0, 0],
        "logs": layer.log_scale[:, 0, 0],
    }
    return {f"{name}/{key}": layout(value) for key, value in weights.items()}


def with_edge(weight, edge):
    """The weight of a convolution whose input has the edge channel, if there is an edge."""
    if edge is None:
        return weight
    return torch.cat([weight, edge.weight], 1)


def alternate(ours):
    """[mean 0, mean 1, ..., scale 0, scale 1, ...] -> [mean 0, scale 0, mean 1, scale 1, ...]."""
    return torch.stack(ours.chunk(2), 1).flatten(0, 1)


def unchanged(ours):
    return ours


# How the authors' code orders the outputs of a coupling's network.
LAYOUTS = {SigmoidCoupling: alternate, AdditiveCoupling: unchanged}


# ---------------------------------------------------------------------- helpers


def tiny(shape=(3, 4, 8), n_levels=2, depth=2, hidden_channels=5, seed=0, **arguments):
    """A small Glow with its initial weights, in float64."""
    torch.manual_seed(seed)
    return Glow(shape, n_levels, depth, hidden_channels, **arguments).double()


def images(n, shape, seed=0, n_bits=8):
    """Smooth images with some noise, of n_bits and dequantised: float64 in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, shape[0], 2, 2, generator=generator)
    smooth = F.interpolate(coarse, shape[1:], mode="bilinear")
    mixed = 0.8 * smooth + 0.2 * torch.rand(smooth.shape, generator=generator)
    q = (mixed * 2**n_bits).floor().clamp(0, 2**n_bits - 1)
    return (q.double() + torch.rand(q.shape, generator=generator).double()) / 2**n_bits


@torch.no_grad()
def started(flow, scale=0.05, seed=5):
    """The flow in eval mode, initialised from images and perturbed, so that no weight is 0."""
    flow.initialize(images(32, flow.shape, seed).to(next(flow.parameters())))
    return perturb(flow, scale).eval()


def reference(flow, initializing=False, coupling="affine", edges=True):
    depth = len(flow.levels[-1].layers[1].layers) // 3
    return ReferenceGlow(
        authors_weights(flow), len(flow.levels), depth, coupling, edges, initializing
    )


def actnorms(flow):
    return [m for m in flow.modules() if isinstance(m, ActNorm)]


def n_parameters(flow):
    return sum(parameter.numel() for parameter in flow.parameters())


def assert_close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance
    )


# ---------------------------------------------------------------------- against the reference

VARIANTS = [
    *(
        {"coupling": coupling, "edges": edges}
        for coupling, edges in itertools.product(("affine", "additive"), (1, 0))
    ),
    {"permutation": "invertible_plain"},
    {"permutation": "reverse", "edges": False},
    {"permutation": "shuffle", "coupling": "additive"},
    {"n_levels": 1},
    {"n_levels": 3, "shape": (1, 8, 16)},
]
variants = pytest.mark.parametrize(
    "arguments", VARIANTS, ids=lambda a: "-".join(str(value) for value in a.values())
)


def reference_of(flow, arguments, initializing=False):
    return reference(
        flow, initializing, arguments.get("coupling", "affine"), arguments.get("edges", True)
    )


@variants
def test_log_prob_is_that_of_the_authors_model(arguments):
    flow = started(tiny(**arguments))
    for n_bits in (8, 5):
        x = images(4, flow.shape, seed=1, n_bits=n_bits)
        with torch.no_grad():
            ours = bits_per_dim(flow.log_prob(x), x[0].numel(), n_bits)
            theirs, _ = reference_of(flow, arguments).bits(x, n_bits)
        assert_close(ours, theirs, 1e-10)
    assert ours.std() > 1e-3


@variants
def test_gradients_are_those_of_the_authors_model(arguments):
    flow = started(tiny(**arguments)).train()
    x = images(4, flow.shape, seed=1).requires_grad_()
    parameters = dict(flow.named_parameters())
    ours = torch.autograd.grad(flow.log_prob(x).mean(), [x, *parameters.values()])
    nats = -math.log(2) * x[0].numel() * reference_of(flow, arguments).bits(x, 0)[0].mean()
    theirs = torch.autograd.grad(nats, [x, *parameters.values()])
    for name, a, b in zip(["x", *parameters], ours, theirs, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-10, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert a.abs().max() > 1e-6, name


@variants
def test_initialisation_is_that_of_the_authors_model(arguments):
    """Their code sets each layer in the pass in which it evaluates the first batch."""
    flow = tiny(**arguments)
    x = images(32, flow.shape, seed=5)
    with torch.no_grad():
        theirs = reference_of(flow, arguments, initializing=True)
        theirs.bits(x, 8)
        flow.initialize(x)
    ours = authors_weights(flow)
    assert len(actnorms(flow)) == 3 * len(flow.levels) * 2
    assert ours.keys() == theirs.weights.keys()
    for name, value in ours.items():
        assert_close(value.detach(), theirs.weights[name], 1e-9)


@variants
def test_samples_are_those_of_the_authors_model(arguments):
    """tau sigma replaces sigma in the prior of every level."""
    flow = started(tiny(**arguments))
    temperature = 0.6
    generator = torch.Generator().manual_seed(2)
    eps = [
        torch.randn(3, *shape, generator=generator, dtype=torch.float64)
        for shape in flow.latent_shapes()
    ]
    with torch.no_grad():
        theirs = reference_of(flow, arguments).decode(eps, temperature)
        ours = flow.sample(3, temperature, generator=torch.Generator().manual_seed(2))
        hotter = flow.sample(3, 1.0, generator=torch.Generator().manual_seed(2))
    assert_close(ours, theirs, 1e-9)
    assert (ours - hotter).abs().max() > 1e-2
    latents, _ = flow(theirs)
    for ours_eps, level in zip(latents, eps, strict=True):
        assert_close(ours_eps.detach(), temperature * level, 1e-9)


def test_a_class_conditional_objective_is_that_of_the_authors_model():
    """It is bits per dimension plus .01 of the cross entropy in bits; gradients too."""
    flow = started(tiny(n_classes=4)).train()
    x = images(6, flow.shape, seed=1)
    y = torch.tensor([0, 3, 1, 1, 2, 0])
    theirs = reference(flow)
    bits, top = theirs.bits(x, 5, y)
    logits = theirs.linear_zeros("classifier", top)
    log_prob, our_logits = flow.log_prob_and_class_logits(x, y)
    assert_close(bits_per_dim(log_prob, x[0].numel(), 5), bits, 1e-10)
    assert_close(our_logits, logits, 1e-10)
    assert_close(flow.log_prob(x, y), log_prob, 1e-10)
    objective = (bits + 0.01 * F.cross_entropy(logits, y, reduction="none") / math.log(2)).mean()
    n_dims = x[0].numel()
    nats = -log_prob.mean() + 0.01 * n_dims * F.cross_entropy(our_logits, y)
    ours = nats / (n_dims * math.log(2))
    parameters = dict(flow.named_parameters())
    gradients = (torch.autograd.grad(value, parameters.values()) for value in (ours + 5, objective))
    for name, a, b in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert_close(ours + 5, objective, 1e-10)


def test_class_logits_of_a_glow_without_classes_are_one_line():
    flow = tiny()
    message = "^this Glow is not class-conditional: build it with n_classes$"
    with pytest.raises(ValueError, match=message):
        flow.log_prob_and_class_logits(images(2, flow.shape), None)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_class_that_does_not_exist_fails_where_its_value_is_not_checked(label):
    """As on a GPU, where the flow checks no values: no density, rather than a wrong one."""
    prior = TopPrior(2, edges=False, n_classes=3)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        prior(torch.zeros(1, 2, 2, 2), torch.tensor([label]))


def test_without_weights_it_is_a_standard_normal_of_x_minus_a_half():
    flow = tiny(permutation="reverse", coupling="additive")
    x = images(3, flow.shape)
    normal = -0.5 * ((x - 0.5) ** 2 + math.log(2 * math.pi)).sum((1, 2, 3))
    assert_close(flow.log_prob(x), normal)
    assert_close(bits_per_dim(flow.log_prob(x), 96, 5), 5 - normal / (96 * math.log(2)))


def test_a_uniform_density_of_5_bit_data_costs_5_bits():
    module = DensityModule(tiny(), UniformDequantizer(5), 5, seed=0)
    assert torch.equal(module.loss_per_datum(torch.zeros(3)), torch.full((3,), 5.0))
    q = torch.arange(32, dtype=torch.uint8)
    assert_close(module.dequantizer(q, torch.full((32,), 0.5))[0], (torch.arange(32) + 0.5) / 32)


# ---------------------------------------------------------------------- size and settings


def conditioner_size(c_in, c_out, hidden):
    """The number of parameters of a conditioner; both 3x3 convolutions have an edge channel."""
    convolutions = 9 * (c_in + 1) * hidden + hidden**2 + 9 * (hidden + 1) * c_out
    actnorms = 2 * 2 * hidden
    bias_and_scale_of_the_last = 2 * c_out
    return convolutions + actnorms + bias_and_scale_of_the_last


def model_size(channels, n_levels, depth, hidden):
    total = 0
    c = channels
    for i in range(n_levels):
        c *= 4
        # An actnorm; L and U as whole matrices, and s; the conditioner.
        total += depth * (2 * c + 2 * c**2 + c + conditioner_size(c // 2, c, hidden))
        if i < n_levels - 1:
            total += 9 * (c // 2 + 1) * c + 2 * c
            c //= 2
    return total + 2 * c * (9 + 2)  # the last prior: border, b, logs


def test_paper_size_has_44_620_116_parameters():
    with torch.device("meta"):
        assert n_parameters(Glow()) == model_size(3, 3, 32, 512) == 44_620_116


def test_parameters_that_the_edges_and_the_triangles_add():
    """Plain W has C^2 numbers. L and U are whole matrices, each with an unused triangle."""
    edges = sum(2 * 9 * (7 + c) for c in (12, 24, 48)) + 9 * (12 + 24 + 2 * 48)
    more = sum(2 * c * (c + 1) for c in (12, 24, 48))
    with torch.device("meta"):
        both, without, plain = (
            n_parameters(Glow((3, 8, 8), 3, depth=2, hidden_channels=7, **arguments))
            for arguments in ({}, {"edges": False}, {"permutation": "invertible_plain"})
        )
    assert both == model_size(3, 3, 2, 7)
    assert without == both - edges
    assert plain == both - more


@pytest.mark.parametrize(("size", "n_levels"), [(32, 3), (64, 4)])
def test_latent_shapes(size, n_levels):
    flow = tiny((3, size, size), n_levels, depth=1, hidden_channels=2)
    expected = [(6 * 2**i, size // 2 ** (i + 1), size // 2 ** (i + 1)) for i in range(n_levels)]
    c, h, w = expected[-1]
    expected[-1] = (2 * c, h, w)
    assert flow.latent_shapes() == tuple(expected)
    if size == 32:
        assert expected == [(6, 16, 16), (12, 8, 8), (48, 4, 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coupling": "afine"}, "flow.coupling=afine is not known: give one of affine, additive"),
        (
            {"permutation": "conv"},
            "flow.permutation=conv is not known: give one of reverse, shuffle, invertible",
        ),
        (
            {"n_levels": 3},
            "flow.n_levels=3 halves a 4x8 image to odd sizes: give at most flow.n_levels=2, or "
            "sides that are multiples of 8",
        ),
        (
            {"shape": (3, 7, 8), "n_levels": 1},
            "flow.n_levels=1 halves a 7x8 image to odd sizes: give sides that are multiples of 2",
        ),
        ({"n_levels": 0}, "flow.n_levels"),
        ({"depth": 0}, "flow.depth"),
        ({"hidden_channels": -1}, "flow.hidden_channels"),
        ({"shape": (2,)}, r"\(2,\)"),
        ({"shape": (None, 4, 8)}, r"Glow models images \(C, H, W\), not .* \(None, 4, 8\)"),
        ({"alpha": 0.5}, "alpha=0.5"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_one_line_that_names_it(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny(**arguments)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- initialisation


def test_every_actnorm_starts_with_mean_0_and_variance_1(monkeypatch):
    """Those of the networks too. Each input is the output of the layers before, already set."""
    flow = tiny()
    x = images(32, (3, 4, 8))
    seen = []
    normalize = ActNorm.normalize

    def noted(self, x):
        y = normalize(self, x)
        seen.append((x, y))
        return y

    with torch.no_grad():
        flow.initialize(x)
        monkeypatch.setattr(ActNorm, "normalize", noted)
        # Again: all are set, so nothing changes, and unlike `forward` this folds no actnorm.
        flow.initialize(x)
    assert len(seen) == len(actnorms(flow)) == 12
    for before, after in seen:
        std = before.var((0, 2, 3), correction=0).sqrt()
        assert_close(after.mean((0, 2, 3)), torch.zeros(len(std)), 1e-10)
        assert_close(after.var((0, 2, 3), correction=0).sqrt(), std / (std + 1e-6), 1e-10)
        assert std.min() > 1e-3  # then the variance is 1 to within 2e-3


@pytest.mark.parametrize("coupling", ["affine", "additive"])
def test_log_det_after_initialisation(coupling):
    """A network's last layer is 0, so a coupling scales C/2 H W elements by sigmoid(2).

    Priors and rotations do not scale at first.
    """
    flow = tiny(coupling=coupling)
    x = images(32, (3, 4, 8))
    with torch.no_grad():
        flow.initialize(x)
        _, log_det = flow(x)
    expected = 0.0
    for level, (c, h, w) in zip(flow.levels, [(12, 2, 4), (24, 1, 2)], strict=True):
        for actnorm in (layer for layer in level.layers[1].layers if isinstance(layer, ActNorm)):
            expected += h * w * 3 * actnorm.log_scale.sum().item()
            if coupling == "affine":
                expected += c // 2 * h * w * -math.log1p(math.exp(-2))
    # A rotation of float32 numbers has determinant 1 to within 1e-6.
    assert_close(log_det, [expected] * 32, 1e-4)


def test_the_latent_after_initialisation_has_variance_1_on_average():
    """In an additive step nothing but a rotation of the channels follows the actnorm."""
    flow = tiny(n_levels=1, depth=1, coupling="additive")
    x = images(32, (3, 4, 8))
    with torch.no_grad():
        flow.initialize(x)
        (z,), _ = flow(x)
    assert_close(z.mean((0, 2, 3)), torch.zeros(12), 1e-8)
    assert z.var((0, 2, 3), correction=0).mean().item() == pytest.approx(1, abs=1e-4)


def test_loaded_weights_are_not_initialised_again(tmp_path):
    """Four other libraries set a model anew from the first batch after a checkpoint is loaded."""
    flow = started(tiny())
    torch.save(flow.state_dict(), tmp_path / "flow.pt")
    loaded = tiny(seed=1)
    assert uninitialized(loaded)
    loaded.load_state_dict(torch.load(tmp_path / "flow.pt", weights_only=True))
    assert not uninitialized(loaded)
    with torch.no_grad():
        loaded.initialize(images(32, flow.shape, seed=9) / 2)
    assert same(loaded.state_dict(), flow.state_dict())
    x = images(4, flow.shape)
    assert torch.equal(loaded.log_prob(x), flow.log_prob(x))


def test_only_layers_that_are_not_initialised_are_set():
    flow = started(tiny())
    x = images(32, (3, 4, 8), seed=9)
    before = copy.deepcopy(flow.state_dict())
    last = actnorms(flow.levels[1])[0]
    last.initialized.fill_(False)
    with torch.no_grad():
        flow.initialize(x)
    after = flow.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"levels.1.layers.1.layers.0.bias", "levels.1.layers.1.layers.0.log_scale"}


def test_neither_direction_reads_whether_it_is_initialised():
    flow = started(tiny())
    x = images(4, flow.shape)
    z, log_det = flow(x)
    for actnorm in actnorms(flow):
        del actnorm.initialized
    assert torch.equal(flow(x)[1], log_det)
    assert torch.equal(flow.train()(x)[1], log_det)
    assert_close(flow.inverse(z)[0], x, 1e-9)


def test_a_batch_of_one_in_training():
    """No statistic is the batch's: an image alone has the likelihood that it has among others."""
    flow = started(tiny()).train()
    x = images(4, flow.shape)
    together = flow.log_prob(x)
    for i in range(4):
        assert_close(flow.log_prob(x[i : i + 1]), together[i : i + 1])


def test_a_shuffle_is_saved_with_the_weights():
    flow, other = (started(tiny(permutation="shuffle", seed=seed)) for seed in (0, 1))
    orders = [name for name in flow.state_dict() if name.endswith("order")]
    assert len(orders) == 4
    state = flow.state_dict()
    other_state = other.state_dict()
    assert any(not torch.equal(state[name], other_state[name]) for name in orders)
    x = images(4, flow.shape)
    assert not torch.equal(other.log_prob(x), flow.log_prob(x))
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other.log_prob(x), flow.log_prob(x))


def test_a_seed_decides_the_weights():
    assert same(tiny(seed=3).state_dict(), tiny(seed=3).state_dict())


# ---------------------------------------------------------------------- at the paper's depth


@pytest.fixture(scope="module")
def deep():
    """96 steps, as the paper's CIFAR-10 model; in float64."""
    return started(tiny((1, 8, 8), n_levels=3, depth=32, hidden_channels=4), 0.02)


def test_a_deep_flow_inverts(deep):
    x = images(4, deep.shape, seed=1)
    for model, tolerance in ((copy.deepcopy(deep).float(), 1e-4), (deep, 1e-9)):
        data = x.to(next(model.parameters()))
        with torch.no_grad():
            latents, log_det = model(data)
            back, inverse_log_det = model.inverse(latents)
            samples = model.sample(4, generator=torch.Generator().manual_seed(0))
        assert_close(back, data, tolerance)
        assert_close(inverse_log_det, -log_det, 20 * tolerance)
        assert samples.isfinite().all()


def test_log_det_and_gradients_of_a_deep_flow(deep):
    """Row i of a Jacobian is the gradient of z_i; D copies of one x give all rows in one pass."""
    x = images(1, deep.shape, seed=1)
    rows = x.repeat(64, 1, 1, 1).requires_grad_()
    z, log_det = deep(rows)
    (jacobian,) = torch.autograd.grad(flat(z).diagonal().sum(), rows, retain_graph=True)
    assert_close(log_det[0].detach(), torch.linalg.slogdet(jacobian.flatten(1)).logabsdet, 1e-8)
    log_prob = deep.base.log_prob(z).mean() + log_det.mean()
    gradients = torch.autograd.grad(log_prob, deep.parameters())
    assert all(gradient.isfinite().all() for gradient in gradients)


def first_steps(lr, n=10):
    """Bits/dim before the first and after each of n Adamax steps, and the flow.

    The flow is a deep affine Glow; the data are the same four images of noise in every step.
    """
    flow = tiny((3, 8, 8), n_levels=2, depth=32, hidden_channels=16).float()
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    flow.initialize(x.repeat(2, 1, 1, 1))  # the moments of x, of which there would be too few
    optimizer = torch.optim.Adamax(flow.parameters(), 1.0, betas=(0.9, 0.9898))
    bits = []
    for step in range(n + 1):
        loss = bits_per_dim(flow.log_prob(x), 192, 8).mean()
        bits.append(loss.item())
        if step < n:
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = lr(step)
            optimizer.step()
    return bits, flow


def test_the_first_steps_of_a_deep_affine_flow_do_not_blow_up():
    """With the recipe's warm-up, linear from 0 to 1e-3 over 980 steps; the flow still inverts."""
    bits, flow = first_steps(lambda step: 1e-3 * step / 980)
    assert max(bits) < bits[0] + 0.1, bits
    assert bits[-1] < bits[0]
    x = images(4, flow.shape)
    with torch.no_grad():
        for model, tolerance in ((flow, 1e-4), (copy.deepcopy(flow).double(), 1e-9)):
            data = x.to(next(model.parameters()))
            assert_close(model.inverse(model(data)[0])[0], data, tolerance)


def test_without_a_warm_up_the_first_step_blows_up():
    """The first step moves all of 64 output layers, which were 0, by the learning rate."""
    bits, _ = first_steps(lambda step: 1e-3, n=1)
    assert bits[1] > bits[0] + 1, bits


# ---------------------------------------------------------------------- under a Trainer


def glow(seed=0, **arguments):
    return tiny(SHAPE, 2, 2, 6, seed, **arguments).float()


def first_batch(data, seed=0):
    """All 64 training images in the order of epoch 0, with the noise of its first step.

    The first batch has 256 * 32^2 pixels where the data have so many; these have fewer.
    """
    q = torch.stack([data.train[key][0] for key in TrainSampler(64, 64, seed)])
    return (q.float() + batch_noise((64, *SHAPE), seed, 0, 0, torch.device("cpu"))) / 256


class AtStart(L.Callback):
    """Keeps the weights and the validation before the first step."""

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            self.validated = trainer.callback_metrics["val/bpd"].item()

    def on_train_start(self, trainer, pl_module):
        self.flow = copy.deepcopy(pl_module.flow)


def start(*callbacks):
    at_start = AtStart()
    trainer = make_trainer(
        Initialization(),
        at_start,
        *callbacks,
        max_steps=1,
        limit_val_batches=None,
        num_sanity_val_steps=-1,
        check_val_every_n_epoch=None,
        val_check_interval=4,
    )
    trainer.fit(density(glow()), datamodule=RandomImages())
    return at_start


def test_a_fit_starts_initialised_from_the_first_batch():
    data = RandomImages()
    initial = start()
    by_hand = reference(glow().double(), initializing=True)
    with torch.no_grad():
        by_hand.bits(first_batch(data).double(), 8)
    weights = authors_weights(initial.flow)
    assert not uninitialized(initial.flow)
    assert sum("actnorm" in name for name in weights) == 2 * 12
    for name, value in weights.items():
        expected = by_hand.weights[name]
        torch.testing.assert_close(value.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_averaged_weights_start_initialised_too():
    """The average is a copy of the weights, and is validated before the first step."""
    raw = start()
    averaged = start(EMAWeightAveraging(use_buffers=False, decay=0.9))
    assert raw.validated == averaged.validated
    data = RandomImages()
    flow = raw.flow.eval()
    x = torch.stack([data.val[0, i][0] for i in range(23)]).float()
    with torch.no_grad():
        middle = bits_per_dim(flow.log_prob((x + 0.5) / 256), 192, 8).mean().item()
    assert raw.validated == pytest.approx(middle, abs=0.05)  # the noise differs
    assert same(raw.flow.state_dict(), averaged.flow.state_dict())


@pytest.mark.parametrize(
    ("shape", "n"), [((3, 32, 32), 256), ((3, 64, 64), 64), ((1, 160, 160), 32)]
)
def test_the_first_batch_has_256_images_of_32x32(shape, n):
    """Other sizes have as many pixels together, and at least 32 images."""
    seen = []
    flow = torch.nn.Sequential(ActNorm(2))

    def initialize(n):
        seen.append(n)
        flow[0].initialized.fill_(True)

    module = SimpleNamespace(
        shape=shape, initialize=initialize, needs_initialization=lambda: uninitialized(flow)
    )
    trainer = SimpleNamespace(datamodule=SimpleNamespace(initialization_batch=lambda n: n))
    for stage in ("validate", "test", "fit"):
        Initialization().setup(trainer, module, stage)
    assert seen == [n]
    Initialization().setup(trainer, module, "fit")
    assert seen == [n]


def run(folder, seed, checkpoint=None):
    """Train for six steps, four in an epoch: averaged weights, saved after every third step.

    Returns the losses and the last checkpoint.
    """
    recorder = Recorder()
    module = density(glow(seed), lr=3e-3, name="adamax", warmup_steps=2)
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    average = EMAWeightAveraging(use_buffers=False, decay=0.9)
    trainer = make_trainer(
        Initialization(), recorder, average, saver, max_steps=6, enable_checkpointing=True
    )
    trainer.fit(module, datamodule=RandomImages(), ckpt_path=checkpoint, weights_only=True)
    return recorder.losses, torch.load(folder / "step=6.ckpt", weights_only=True)


def test_a_resumed_fit_keeps_its_actnorms(tmp_path):
    """It goes on bit for bit, average included, though its flow was built with another seed."""
    losses, whole = run(tmp_path / "whole", seed=0)
    later, resumed = run(tmp_path / "resumed", 1, tmp_path / "whole" / "step=3.ckpt")
    assert later == losses[3:]
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        assert same(resumed[part], whole[part]), part


def test_a_run_that_goes_on_is_not_initialised_again(tmp_path, monkeypatch):
    """By reproduce/glow_photos.py; at the paper's size that would be a pass over 256 images."""
    calls = []
    initialize = DensityModule.initialize

    def noted(self, batch):
        calls.append(batch)
        initialize(self, batch)

    monkeypatch.setattr(DensityModule, "initialize", noted)
    arguments = [
        "preset=demo",
        "logger.name=none",
        "flow.n_levels=1",
        "flow.depth=1",
        "flow.hidden_channels=4",
    ]
    arguments += [
        "data.size=8",
        "data.n_train=32",
        "data.batch_size=16",
        "data.n_val=8",
        "data.n_test=8",
        "samples.n=1",
        "samples.temperatures=[0.7]",
        "trainer.precision=32-true",
        f"run_dir={tmp_path}",
    ]
    glow_photos.main([*arguments, "trainer.max_steps=1"])
    assert [len(images) for images, _ in calls] == [32]
    (tmp_path / "result.json").unlink()
    glow_photos.main([*arguments, "trainer.max_steps=2", "resume=auto"])
    assert len(calls) == 1


def test_images_that_are_too_few_for_the_levels_are_one_line_before_training(tmp_path):
    """Two images set scales of thousands; the run ended with 67,782 bits/dim."""
    arguments = ["preset=demo", "logger.name=none", "trainer.precision=32-true"]
    arguments += ["flow.n_levels=5", "flow.depth=1", "flow.hidden_channels=4", "data.n_train=2"]
    arguments += [
        "data.size=32",
        "data.batch_size=2",
        "data.n_val=8",
        "data.n_test=8",
        "trainer.max_steps=1",
    ]
    with pytest.raises(SystemExit) as stop:
        glow_photos.main([*arguments, f"run_dir={tmp_path}"])
    assert stop.value.code == (
        "error: the first batch, 2 data of 2x2 pixels at an ActNorm, is too small to set it: "
        "give 32 data or more, or a model with fewer levels"
    )
    assert not (tmp_path / "result.json").exists()
