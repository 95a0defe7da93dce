"""Fast paths compute what they replace: folded steps, gradients by hand, recomputation, caches."""

import copy
import functools
import itertools
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from cases import CASES, MODELS, fresh, perturb, trained
from torch import nn
from torch.nn import functional as F

from flows import constants
from flows.base import Compose
from flows.caching import cached, once
from flows.conditioners import ResidualBlock
from flows.constants import constant
from flows.coupling import MaskedCoupling, SigmoidCoupling
from flows.glow import Glow
from flows.glow.conditioner import GlowConditioner
from flows.glow.edges import ZeroConv2d
from flows.glow.kernels import (
    add_relu,
    conv3x3_by_patches,
    conv3x3_by_shifts,
    conv3x3_gradients,
    relu_gradient,
    scaled,
)
from flows.glow.steps import Steps
from flows.linear import InvertibleConv1x1LU
from flows.masks import Checkerboard, checkerboard
from flows.normalization import ActNorm
from flows.realnvp import RealNVP
from flows.recompute import recompute
from lightning_modules.batch_norm import reestimated
from lightning_modules.precision import evaluation

BOTH = [
    case
    for case in MODELS
    if case.name in ("Glow", "Glow-additive-shuffle-logit", "RealNVP-2scales")
]
both = pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_steps_are_their_layers_one_after_another():
    case = next(case for case in CASES if case.name == "Steps")
    steps = trained(case, torch.float64)
    x = case.data(5, torch.float64)
    for fast, plain in (
        (steps(x), Compose.forward(steps, x)),
        (steps.inverse(x), Compose.inverse(steps, x)),
    ):
        for a, b in zip(fast, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def by_autograd(flow):
    """A copy of the flow whose gradients autograd computes from the layers' own code."""
    flow = copy.deepcopy(flow)
    for module in flow.modules():
        if isinstance(module, Steps):
            module.forward = functools.partial(Compose.forward, module)
    return flow


GLOWS = [
    {},
    {"coupling": "additive"},
    {"min_scale": 0.3},
    {"edges": False},
    {"permutation": "shuffle"},
]
glows = pytest.mark.parametrize(
    "options", GLOWS, ids=lambda options: "-".join(map(str, options.values())) or "paper"
)


def glow(options):
    torch.manual_seed(0)
    return perturb(Glow((3, 8, 8), 2, 3, 6, **options), 0.1).double(), randn(5, 3, 8, 8).sigmoid()


@glows
@pytest.mark.parametrize("lean", [False, True])
def test_gradients_by_hand_are_those_of_autograd(options, lean):
    """Of weights and images; also where a loss takes one output of a step, or none."""
    flow, x = glow(options)
    plain = by_autograd(flow)
    if lean:
        recompute(flow)

    def latents_alone(f, x):
        return f(x)[0][-1].square().sum()

    def log_det_alone(f, x):
        return f(x)[1].square().sum()

    for loss in (lambda f, x: f.log_prob(x).square().mean() / 1e4, latents_alone, log_det_alone):
        results = []
        for f in (flow, plain):
            images = x.clone().requires_grad_()
            value = loss(f, images)
            inputs = [images, *f.parameters()]
            results.append([value, *torch.autograd.grad(value, inputs, materialize_grads=True)])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
        assert sum(g.abs().max() > 1e-6 for g in results[0]) > len(results[0]) / 4


@glows
def test_gradients_by_hand_can_be_differentiated_again(options):
    flow, x = glow(options)
    results = []
    for f in (flow, by_autograd(flow)):
        images = x.clone().requires_grad_()
        (score,) = torch.autograd.grad(f.log_prob(images).sum(), images, create_graph=True)
        inputs = [images, *f.parameters()]
        results.append(torch.autograd.grad(score.square().mean(), inputs, materialize_grads=True))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    assert results[0][0].abs().max() > 1e-6


def test_weights_that_are_frozen_get_no_gradient():
    flow, x = glow({})
    frozen = [p for name, p in flow.named_parameters() if "conv_mid" in name or "lower" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    plain = by_autograd(flow)
    for f in (flow, plain):
        f.log_prob(x).mean().backward()
    for ours, theirs in zip(flow.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == (not ours.requires_grad)
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-8)
    images = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(flow.log_prob(images).sum(), images, create_graph=True)
    score.square().mean().backward()
    assert all(p.grad is None for p in frozen)


def test_gradients_under_autocast_are_those_of_autograd():
    """Networks are bfloat16: as far from float64 as autograd's own gradients."""
    flow, x = glow({})
    exact = loss_and_gradients(flow, x)
    flow = flow.float()
    x = x.float()
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_gradients(flow, x)
        theirs = loss_and_gradients(by_autograd(flow), x)

    def error(gradients):
        """The mean of the relative errors."""
        errors = [
            (gradient - reference).norm() / (reference.norm() + 1e-3)
            for gradient, reference in zip(gradients, exact, strict=True)
        ]
        return torch.stack([error.double() for error in errors]).mean().item()

    assert 1e-4 < error(ours) < 1.2 * error(theirs)


def test_differentiable_gradients_are_of_the_same_function_under_autocast():
    """The forward pass is outside of autocast, and the backward pass within."""
    flow, x = glow({})
    flow = flow.float()
    x = x.float()
    results = []
    for again in (False, True):
        loss = flow.log_prob(x).mean()
        with torch.autocast("cpu", torch.bfloat16):
            results.append(torch.autograd.grad(loss, list(flow.parameters()), create_graph=again))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())


def test_float64_stays_under_autocast():
    flow, x = glow({})
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = flow.log_prob(x)
    assert torch.equal(under_autocast, flow.log_prob(x))


def test_the_last_bias_is_not_rounded_under_autocast():
    net = GlowConditioner(2, 4, 6, False)
    net.conv_out.shift.data.fill_(1 + 2**-10)
    with torch.autocast("cpu", torch.bfloat16):
        assert (net(torch.rand(2, 2, 4, 4)) == 1 + 2**-10).all()


def test_zero_samples_are_an_empty_batch():
    assert Glow((3, 8, 8), 2, 1, 4).sample(0).shape == (0, 3, 8, 8)


def test_a_step_keeps_its_output_its_scales_and_its_hidden_layers():
    """Counted in numbers for each image.

    Kept are x of the level, y of each step, half as many scales, and by default the hidden layers.
    """
    hidden = 16
    depth = 3
    flow = perturb(Glow((3, 16, 16), 1, depth, hidden), 0.1)
    kept = {}
    steps = flow.levels[0].layers[1]
    x = torch.rand(64, 12, 8, 8).contiguous(memory_format=torch.channels_last)
    own = {p.untyped_storage().data_ptr() for p in (*steps.parameters(), *steps.buffers())}

    def pack(tensor):
        if len(tensor) >= 64 and tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel() // 64
        return tensor

    for lean in (False, True):
        steps.recompute = lean
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y, log_det = steps(x)
        pixels = 8 * 8
        step = 12 + 6
        if not lean:
            step += 2 * hidden
        assert sum(kept.values()) == pixels * (12 + depth * step)
        del y, log_det


@pytest.mark.parametrize(("c_in", "c_out"), [(7, 3), (3, 7)])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_of_a_convolution(c_in, c_out, channels_last, dtype):
    x = randn(2, c_in, 4, 6)
    weight = randn(c_out, c_in, 3, 3, seed=1)
    grad = randn(2, c_out, 4, 6, seed=2)
    if channels_last:
        x, weight, grad = (
            t.contiguous(memory_format=torch.channels_last) for t in (x, weight, grad)
        )
    inputs = [t.to(dtype).double().requires_grad_() for t in (x, weight)]
    theirs = torch.autograd.grad(F.conv2d(*inputs, padding=1), inputs, grad.to(dtype).double())
    ours = conv3x3_gradients(*(t.to(dtype) for t in (grad, x, weight)))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        tolerance = 1e-12
        if dtype == torch.bfloat16:
            tolerance = 2e-2 * b.abs().max().item()
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("product", [conv3x3_by_patches, conv3x3_by_shifts])
@pytest.mark.parametrize(("c_in", "c_out"), [(7, 3), (3, 8), (8, 1)])
def test_a_convolution_as_a_matrix_product(product, c_in, c_out):
    inputs = [
        randn(2, c_in, 4, 6).requires_grad_(),
        randn(c_out, c_in, 3, 3, seed=1).requires_grad_(),
    ]
    grad = randn(2, c_out, 4, 6, seed=2)
    ours = product(*inputs)
    theirs = F.conv2d(*inputs, padding=1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert ours.movedim(1, -1).is_contiguous()
    for a, b in zip(
        torch.autograd.grad(ours, inputs, grad),
        torch.autograd.grad(theirs, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_on_tensor_cores_a_conditioner_is_the_same(monkeypatch):
    net = perturb(GlowConditioner(2, 6, 9, edges=True), 0.3).double()
    x = randn(3, 2, 4, 6)
    expected = net(x)
    products = []

    def noted_and_true(x):
        products.append(x.shape[1])
        return True

    monkeypatch.setattr("flows.glow.kernels._for_tensor_cores", noted_and_true)
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    assert products == [2, 9]


def test_the_sums_of_a_convolution_by_shifts_are_float32_under_autocast():
    x = randn(2, 64, 5, 5).float()
    weight = randn(3, 64, 3, 3, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        half = conv3x3_by_shifts(x, weight)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    assert half.dtype == torch.float32
    # The products are bfloat16.
    assert 1e-3 < (half - exact).abs().max() / exact.abs().max() < 1e-2


@pytest.mark.parametrize(
    ("shape", "bias_shape"),
    [
        ((2, 5, 3, 4), (5, 3, 4)),
        ((2, 5, 3, 4), (5, 1, 1)),
        ((2, 1, 3, 4), (1, 1, 1)),
        ((6, 5), (5,)),
        ((6, 5), None),
    ],
)
def test_add_relu(shape, bias_shape):
    y = randn(*shape)
    grad = randn(*shape, seed=2)
    bias = None
    terms = [y]
    if bias_shape is not None:
        bias = randn(*bias_shape, seed=1)
        terms.append(bias)
    theirs = sum(terms).relu()
    assert 0 < (theirs == 0).sum() < theirs.numel()
    inputs = [x.clone().requires_grad_() for x in terms]
    ours = add_relu(*inputs)
    plain = sum(inputs).relu()
    assert torch.equal(ours, theirs)
    assert torch.equal(inputs[0], y)
    gradients = torch.autograd.grad(ours, inputs, grad)
    for a, b in zip(gradients, torch.autograd.grad(plain, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    expected = gradients[0]
    with torch.no_grad():
        ours = add_relu(y, bias)
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() == y.data_ptr()
        assert torch.equal(relu_gradient(grad, theirs), expected)
    assert torch.equal(grad, expected)


def test_a_weight_is_scaled_in_one_pass_as_in_two():
    weight = randn(5, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    scale = randn(5, seed=1)
    expected = (weight * scale[:, None, None, None]).bfloat16()
    plain = scaled(weight.requires_grad_(), scale, torch.bfloat16)
    with torch.no_grad():
        fast = scaled(weight, scale, torch.bfloat16)
    assert torch.equal(plain, expected)
    assert torch.equal(fast, expected)
    assert fast.stride() == weight.stride()


def loss_and_gradients(flow, x):
    loss = -flow.log_prob(x).mean()
    return [loss, *torch.autograd.grad(loss, list(flow.parameters()))]


@both
@pytest.mark.parametrize("bf16", [False, True])
def test_recomputing_changes_no_bit(case, bf16):
    """Of gradients, of running averages, and of the number of batches."""
    kept = trained(case).train()
    x = case.data(6)
    lean = copy.deepcopy(kept)
    recompute(lean)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        results = [loss_and_gradients(flow, x) for flow in (kept, lean)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    state = trained(case).state_dict()
    after = kept.state_dict()
    assert all(torch.equal(value, lean.state_dict()[name]) for name, value in after.items())
    moved = any(not torch.equal(value, state[name]) for name, value in after.items())
    assert moved == ("RealNVP" in case.name)


def test_recomputation_runs_the_networks_again():
    flow = RealNVP((3, 16, 16), 2, 8, 1)
    x = torch.rand(4, 3, 16, 16)
    calls = []
    recompute(flow)
    net = next(m.conditioner for m in flow.modules() if hasattr(m, "conditioner"))
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    loss = -flow.log_prob(x).mean()
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2
    with torch.no_grad():
        flow.log_prob(x)
    assert len(calls) == 3


def test_a_glow_makes_its_hidden_layers_again_but_not_the_last_convolution(monkeypatch):
    """Also where the backward pass goes through a graph twice."""
    flow = Glow((3, 8, 8), 2, 3, 16)
    made = []
    convolution = F.conv2d
    recompute(flow)

    def noted_convolution(x, weight, **options):
        made.append(len(weight))
        return convolution(x, weight, **options)

    monkeypatch.setattr(F, "conv2d", noted_convolution)
    loss = -flow.log_prob(torch.rand(4, 3, 8, 8)).mean()
    prior_of_the_split = [12]
    assert sorted(made) == [12] * 3 + prior_of_the_split + [16] * 6 + [24] * 3
    made.clear()
    first, second = (
        torch.autograd.grad(loss, list(flow.parameters()), retain_graph=True) for _ in range(2)
    )
    assert made == [16] * 12
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@both
def test_caches_change_no_bit_and_end_with_their_block(case):
    flow = trained(case)
    x = case.data(3)
    z, _ = flow(x)
    with torch.no_grad():
        plain = (flow.inverse(z)[0], flow.log_prob(x))
        with cached(flow):
            first, second = ((flow.inverse(z)[0], flow.log_prob(x)) for _ in range(2))
        for parameter in flow.parameters():
            parameter += 0.01
        after = (flow.inverse(z)[0], flow.log_prob(x))
    for values in zip(plain, first, second, strict=True):
        assert torch.equal(values[0], values[1])
        assert torch.equal(values[0], values[2])
    assert all(not torch.equal(a, b) for a, b in zip(plain, after, strict=True))


def counted(function, calls):
    """The function, which adds an entry to `calls` each time."""

    def wrapped(*arguments):
        calls.append(1)
        return function(*arguments)

    return wrapped


def test_inverses_are_made_once_within_a_block(monkeypatch):
    flow = fresh(next(c for c in MODELS if c.name == "Glow")).eval()
    calls = []
    monkeypatch.setattr("torch.linalg.inv", counted(torch.linalg.inv, calls))
    with torch.no_grad(), cached(flow):
        flow.sample(2)
        flow.sample(2)
    assert len(calls) == 2  # one for each level
    with torch.no_grad():
        flow.sample(2)
    assert len(calls) == 4


def test_a_cache_does_not_serve_gradients_and_ends_after_an_error():
    module = torch.nn.Linear(2, 2)
    made = itertools.count()
    with cached(module):
        assert [once(module, "a", lambda: next(made)) for _ in range(2)] == [0, 1]
        with torch.no_grad():
            assert [once(module, "a", lambda: next(made)) for _ in range(2)] == [2, 2]
            assert once(module, "b", lambda: next(made)) == 3
    with pytest.raises(ZeroDivisionError), torch.no_grad(), cached(module):
        once(module, "a", lambda: next(made) / 0)
    with torch.no_grad():
        assert [once(module, "a", lambda: next(made)) for _ in range(2)] == [5, 6]


@pytest.mark.parametrize(
    "flow", [Glow((3, 16, 16), 2, 2, 8), RealNVP((3, 16, 16), 2, 8, 1)], ids=["Glow", "RealNVP"]
)
def test_images_stay_channels_last_through_every_coupling(flow, monkeypatch):
    seen = []
    # By hand the operations are the same, but couplings are not called as modules.
    monkeypatch.setattr(Steps, "by_hand", False)
    for module in (m for m in flow.modules() if hasattr(m, "conditioner")):
        module.register_forward_hook(lambda module, inputs, y: seen.extend([inputs[0], y[0]]))
        module.conditioner.register_forward_hook(lambda module, inputs, y: seen.append(inputs[0]))
    z, _ = flow(torch.rand(2, 3, 16, 16))
    flow.inverse(z)
    assert len(seen) >= 16
    # Half of the channels is a view with gaps, so the stride of the channels is looked at.
    assert all(x.stride(1) == 1 for x in seen if x.shape[1] > 1)


def test_a_block_within_a_block_and_a_copy_made_in_one():
    module = torch.nn.Linear(2, 2)
    made = itertools.count()
    with torch.no_grad(), cached(module):
        once(module, "a", lambda: next(made))
        with cached(module):
            assert once(module, "a", lambda: next(made)) == 0
        assert once(module, "a", lambda: next(made)) == 0
        copied = copy.deepcopy(module)
    with torch.no_grad():
        assert [once(m, "a", lambda: next(made)) for m in (module, copied, copied)] == [1, 2, 3]


@pytest.mark.slow
def test_the_conditioners_of_a_level_share_one_compiled_graph():
    from torch._dynamo.utils import counters

    def graphs(depth):
        torch.compiler.reset()
        counters.clear()
        flow = Glow((3, 8, 8), 2, depth, 6)
        x = torch.rand(4, 3, 8, 8)
        flow.initialize(x.repeat(2, 1, 1, 1))  # 32 values of a channel, as it needs
        expected = loss_and_gradients(flow, x)
        flow.compile()
        for a, b in zip(loss_and_gradients(flow, x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        return counters["stats"]["unique_graphs"]

    assert graphs(1) == graphs(3) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [lambda: Glow((3, 8, 8), 3, 1, 6), lambda: RealNVP((3, 8, 8), 2, 6, 1)]
)
@pytest.mark.parametrize("lean", [False, True])
def test_a_compiled_flow_stays_compiled_through_validation_and_training(make, lean, monkeypatch):
    """Batches of two sizes without gradients, evaluation, then training: all compiled."""
    torch.compiler.reset()
    torch.manual_seed(0)
    flow = make()
    x = torch.rand(6, 3, 8, 8)
    flow.initialize(x.repeat(6, 1, 1, 1))  # more than 32 values of a channel, as it needs
    plain = copy.deepcopy(flow).train()
    expected = loss_and_gradients(plain, x)
    if lean:
        recompute(flow)
    flow.compile(backend="aot_eager")
    with torch.no_grad():
        for batch in (x, x[:4]):
            flow.eval().log_prob(batch)
            with evaluation("cpu"):
                flow.log_prob(batch)
    eager = []
    monkeypatch.setattr(GlowConditioner, "hidden", noted(GlowConditioner.hidden, eager))
    monkeypatch.setattr(ResidualBlock, "forward", noted(ResidualBlock.forward, eager))
    for a, b in zip(loss_and_gradients(flow.train(), x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert eager == []
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(flow.state_dict()[name], value, rtol=1e-4, atol=1e-4)


def noted(method, calls):
    """The method, which adds to `calls` when it runs without being compiled."""

    def wrapped(self, *arguments):
        if not torch.compiler.is_compiling():
            calls.append(self)
        return method(self, *arguments)

    return wrapped


def test_networks_are_folded_together_as_each_alone():
    nets = [perturb(GlowConditioner(2, 6, 5, True), 0.3).double() for _ in range(3)]
    x = randn(3, 2, 4, 6)
    for net, folded in zip(nets, GlowConditioner.fold(nets), strict=True):
        weights = net.weights(folded, x.dtype)
        biases = net.biases(folded, x.dtype, (4, 6))
        torch.testing.assert_close(
            net.last(net.hidden(x, weights, biases)[1], weights, biases),
            net(x),
            rtol=1e-12,
            atol=1e-12,
        )
    assert (nets[0](x) - nets[1](x)).abs().max() > 0.1


# ---------------------------------------------------------------------- other networks


class RandomNet(nn.Module):
    """Two convolutions with dropout between them.

    layer: dropout is a layer, or else a function, which nobody can see from outside.
    declared: the network declares that it is random. pair: it has two outputs.
    """

    def __init__(self, in_channels, out_channels, layer=True, declared=False, pair=False):
        super().__init__()
        self.first = nn.Conv2d(in_channels, 8, 1)
        self.last = nn.Conv2d(8, out_channels, 1)
        self.dropout = functools.partial(F.dropout, p=0.5)
        if layer:
            self.dropout = nn.Dropout(0.5)
        self.is_random = declared
        self.pair = pair

    def forward(self, x, context=None):
        h = self.last(self.dropout(self.first(x)))
        if self.pair:
            return h.chunk(2, dim=1)
        return h


def random_steps():
    torch.manual_seed(0)
    steps = Steps(
        (ActNorm(4), InvertibleConv1x1LU(4), SigmoidCoupling(RandomNet(2, 4))) for _ in range(3)
    )
    return perturb(steps, 0.1).double()


def random_coupling(**options):
    torch.manual_seed(0)
    network = RandomNet(4, 8, pair=True, **options)
    return perturb(MaskedCoupling(Checkerboard(0), network, 1.0), 0.1).double()


def gradients(flow, x, seed=1):
    torch.manual_seed(seed)
    z, log_det = flow(x)
    return torch.autograd.grad(z.square().sum() + log_det.sum(), list(flow.parameters()))


def test_steps_with_a_network_that_is_not_glow_s_are_their_layers_one_after_another():
    steps = random_steps().eval()
    x = randn(5, 4, 2, 3)
    for fast, plain in (
        (steps(x), Compose.forward(steps, x)),
        (steps.inverse(x), Compose.inverse(steps, x)),
    ):
        for a, b in zip(fast, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(gradients(steps, x), gradients(by_autograd_alone(steps), x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def by_autograd_alone(steps):
    plain = copy.deepcopy(steps)
    plain.forward = functools.partial(Compose.forward, plain)
    return plain


class Doubled(SigmoidCoupling):
    """A subclass that computes something else."""

    def change(self, x, h):
        y, log_det, state = super().change(x, h)
        return 2 * y, log_det + math.log(2) * y[0].numel(), state


def test_a_subclass_of_glow_s_coupling_has_no_gradients_by_hand():
    torch.manual_seed(0)
    steps = Steps([(ActNorm(4), InvertibleConv1x1LU(4), Doubled(GlowConditioner(2, 4, 5, True)))])
    steps = perturb(steps, 0.1).double()
    x = randn(5, 4, 2, 3)
    for a, b in zip(gradients(steps, x), gradients(by_autograd_alone(steps), x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "make", [random_steps, random_coupling, partial(random_coupling, layer=False, declared=True)]
)
def test_a_random_network_draws_the_same_again_under_recomputation(make):
    """With other numbers in the backward pass the gradients would be far off."""
    flow = make()
    x = randn(5, 4, 2, 3)
    expected = gradients(flow, x)
    others = gradients(flow, x, seed=2)
    assert max((a - b).abs().max() for a, b in zip(expected, others, strict=True)) > 1e-3
    recompute(flow)
    assert all(torch.equal(a, b) for a, b in zip(gradients(flow, x), expected, strict=True))


def test_a_random_network_that_does_not_declare_it_is_refused_by_name():
    flow = random_coupling(layer=False)
    x = randn(5, 4, 2, 3)
    gradients(flow, x)
    recompute(flow)
    message = r"RandomNet draws random numbers, and .* declare is_random = True"
    with pytest.raises(RuntimeError, match=message):
        gradients(flow, x)
    with torch.no_grad():  # without a backward pass nothing is recomputed
        flow(x)


# ---------------------------------------------------------------------- sizes


def test_what_is_cached_for_a_size_is_right_for_another(monkeypatch):
    torch.manual_seed(0)
    flow = perturb(Glow((3, None, None), 2, 2, 6), 0.1).double().eval()
    small, large = (randn(2, 3, *size).sigmoid() for size in ((8, 8), (4, 12)))
    expected = [flow.log_prob(x) for x in (small, large)]
    folded = []
    fold = ZeroConv2d._folded

    def noted_fold(conv, size):
        folded.append(size)
        return fold(conv, size)

    monkeypatch.setattr(ZeroConv2d, "_folded", noted_fold)
    with torch.no_grad(), cached(flow):
        for i in (0, 0, 1, 0):
            x = (small, large)[i]
            torch.testing.assert_close(flow.log_prob(x), expected[i], rtol=0, atol=1e-9)
            torch.testing.assert_close(flow.inverse(flow(x)[0])[0], x, rtol=0, atol=1e-9)
    # Of the one prior of a split. The newest size is kept.
    assert folded == [(4, 4), (2, 6), (4, 4)]


def test_a_constant_is_shared_and_can_be_trained_with_after_inference_mode():
    with torch.inference_mode():
        one = constant(checkerboard, 5, 7, 0, like=torch.empty(0))
    two = constant(checkerboard, 5, 7, 0, like=torch.empty(0))
    assert one is two
    assert torch.equal(one, checkerboard(5, 7, 0))
    weight = torch.ones(5, 7, requires_grad=True)
    (weight * one).sum().backward()
    assert torch.equal(weight.grad, one)
    like = torch.empty(0, dtype=torch.float64)
    assert constant(checkerboard, 5, 7, 0, like=like).dtype == torch.float64


def test_a_captured_graph_keeps_the_constants_that_it_reads(monkeypatch):
    """The passes before a capture make them; the capture copies nothing from the host."""
    gpu = type("Device", (), {"type": "cuda"})()
    tensor = torch.ones(3)
    like = SimpleNamespace(dtype=torch.float32, device=gpu)
    monkeypatch.setattr(constants, "_computed_once", lambda *key: tensor)
    monkeypatch.setattr(constants, "READ_BY_GRAPHS", {})
    for capturing in (False, True):
        monkeypatch.setattr(
            torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing
        )
        assert constant(checkerboard, 2, 2, 0, like=like) is tensor
        assert list(constants.READ_BY_GRAPHS.values()) == [tensor] * capturing


# ---------------------------------------------------------------------- training


def test_dropout_is_left_out_of_reestimated_statistics():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.dropout(x))

    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + 3
    fresh = reestimated(Dropped(), [(x,)])
    torch.testing.assert_close(fresh.norm.running_mean, x.mean(0))
    torch.testing.assert_close(fresh.norm.running_var, x.var(0))
