"""What is fast is what it replaces: folded steps, narrow gradients, recomputed networks, cached inverses."""

import copy
import itertools

import pytest
import torch
from cases import CASES, MODELS, fresh, perturb, trained
from torch.nn import functional as F

from flows.base import Compose
from flows.caching import cached, once
from flows.conditioners import ResidualBlock
from flows.convolution import add_relu, conv3x3, gathered, scattered
from flows.glow import Glow
from flows.glow_conditioner import GlowConditioner
from flows.realnvp import RealNVP
from flows.recompute import recompute
from lightning_modules.metrics import evaluation

BOTH = [case for case in MODELS if case.name in ("Glow", "Glow-additive-shuffle-logit", "RealNVP-2scales")]
both = pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_steps_are_their_layers_one_after_another():
    case = next(case for case in CASES if case.name == "Steps")
    steps, x = trained(case, torch.float64), case.data(5, torch.float64)
    for fast, plain in ((steps(x), Compose.forward(steps, x)), (steps.inverse(x), Compose.inverse(steps, x))):
        for a, b in zip(fast, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("c_in", "c_out"), [(7, 3), (3, 7)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_gradients_of_a_narrow_convolution(c_in, c_out, channels_last):
    x, weight, grad = randn(2, c_in, 4, 6), randn(c_out, c_in, 3, 3, seed=1), randn(2, c_out, 4, 6, seed=2)
    if channels_last:
        x, weight, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, grad))
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    ours, theirs = conv3x3(*inputs), F.conv2d(*inputs, padding=1)
    assert torch.equal(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("product", [gathered, scattered])
@pytest.mark.parametrize(("c_in", "c_out"), [(7, 3), (3, 8), (8, 1)])
def test_a_convolution_as_a_matrix_product(product, c_in, c_out):
    inputs = [randn(2, c_in, 4, 6).requires_grad_(), randn(c_out, c_in, 3, 3, seed=1).requires_grad_()]
    grad, ours, theirs = randn(2, c_out, 4, 6, seed=2), product(*inputs), F.conv2d(*inputs, padding=1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert ours.movedim(1, -1).is_contiguous()
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_on_tensor_cores_a_conditioner_is_the_same(monkeypatch):
    net, x = perturb(GlowConditioner(2, 6, 9, (4, 6)), 0.3).double(), randn(3, 2, 4, 6)
    expected, products = net(x), []
    monkeypatch.setattr("flows.convolution._for_tensor_cores", lambda x: products.append(x.shape[1]) or True)
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    assert products == [2, 9]


def test_the_sums_of_a_scattered_convolution_are_float32_under_autocast():
    x, weight = randn(2, 64, 5, 5).float(), randn(3, 64, 3, 3, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        half = scattered(x, weight)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    assert half.dtype == torch.float32
    assert 1e-3 < (half - exact).abs().max() / exact.abs().max() < 1e-2  # of the products' bf16


@pytest.mark.parametrize(
    ("shape", "bias_shape"),
    [((2, 5, 3, 4), (5, 3, 4)), ((2, 5, 3, 4), (5, 1, 1)), ((2, 1, 3, 4), (1, 1, 1)), ((6, 5), (5,))],
)
def test_add_relu(shape, bias_shape):
    y, bias, grad = randn(*shape).requires_grad_(), randn(*bias_shape, seed=1).requires_grad_(), randn(*shape, seed=2)
    ours, theirs = add_relu(y * 1, bias), (y + bias).relu()
    assert torch.equal(ours, theirs)
    assert 0 < (theirs == 0).sum() < theirs.numel()
    for a, b in zip(
        torch.autograd.grad(ours, [y, bias], grad), torch.autograd.grad(theirs, [y, bias], grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradients_can_be_differentiated_again():
    net, x = perturb(GlowConditioner(2, 3, 6, (4, 5)), 0.3).double(), randn(2, 2, 4, 5).requires_grad_()
    by_hand = F.conv2d(x, net.conv_in.weight, padding=1) + net.conv_in.edge()
    by_hand = net.norm_mid.normalize(net.conv_mid(net.norm_in.normalize(by_hand).relu())).relu()
    out = net.conv_out
    by_hand = (F.conv2d(by_hand, out.weight, padding=1) + out.edge() + out.shift) * torch.exp(3 * out.log_scale)
    first = [torch.autograd.grad(y.square().sum(), x, create_graph=True)[0] for y in (net(x), by_hand)]
    second = [torch.autograd.grad(g.square().sum(), [x, *net.parameters()]) for g in first]
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert second[0][0].abs().max() > 0


def loss_and_gradients(flow, x):
    loss = -flow.log_prob(x).mean()
    return [loss, *torch.autograd.grad(loss, list(flow.parameters()))]


@both
@pytest.mark.parametrize("bf16", [False, True])
def test_recomputing_changes_no_bit(case, bf16):
    """Neither of gradients nor of running averages, nor of the count of batches."""
    kept, x = trained(case).train(), case.data(6)
    lean = copy.deepcopy(kept)
    recompute(lean)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        results = [loss_and_gradients(flow, x) for flow in (kept, lean)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    state = trained(case).state_dict()
    assert all(torch.equal(value, lean.state_dict()[name]) for name, value in kept.state_dict().items())
    assert ("RealNVP" in case.name) == any(not torch.equal(v, state[k]) for k, v in kept.state_dict().items())


@both
def test_recomputing_does_compute_again(case, monkeypatch):
    flow, calls = fresh(case).train(), []
    recompute(flow)
    net = next(m.conditioner for m in flow.modules() if hasattr(m, "conditioner"))
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    loss = -flow.log_prob(case.data(4)).mean()
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2
    with torch.no_grad():
        flow.log_prob(case.data(4))
    assert len(calls) == 3


def test_the_last_convolution_is_not_made_again(monkeypatch):
    """Nor when a graph is gone through twice."""
    flow, made, convolution = Glow((3, 8, 8), 2, 3, 16), [], F.conv2d
    recompute(flow)
    monkeypatch.setattr(F, "conv2d", lambda x, weight, **k: made.append(len(weight)) or convolution(x, weight, **k))
    loss = -flow.log_prob(torch.rand(4, 3, 8, 8)).mean()
    assert sorted(made) == [12] * 3 + [12] + [16] * 6 + [24] * 3  # the one is of the split's prior, in no step
    made.clear()
    first, second = (torch.autograd.grad(loss, list(flow.parameters()), retain_graph=True) for _ in range(2))
    assert made == [16] * 12
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@both
def test_caches_change_no_bit_and_end_with_their_block(case):
    flow, x = trained(case), case.data(3)
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


def test_inverses_are_made_once_within_a_block(monkeypatch):
    flow, calls, inverse = fresh(next(c for c in MODELS if c.name == "Glow")).eval(), [], torch.linalg.inv
    monkeypatch.setattr("torch.linalg.inv", lambda *a: calls.append(1) or inverse(*a))
    with torch.no_grad(), cached(flow):
        flow.sample(2)
        flow.sample(2)
    assert len(calls) == 2  # one a level
    with torch.no_grad():
        flow.sample(2)
    assert len(calls) == 4


def test_a_cache_does_not_serve_gradients_and_ends_after_an_error():
    module, made = torch.nn.Linear(2, 2), itertools.count()
    with cached(module):
        assert [once(module, "a", lambda: next(made)) for _ in range(2)] == [0, 1]
        with torch.no_grad():
            assert [once(module, "a", lambda: next(made)) for _ in range(2)] == [2, 2]
            assert once(module, "b", lambda: next(made)) == 3
    with pytest.raises(ZeroDivisionError), torch.no_grad(), cached(module):
        once(module, "a", lambda: next(made) / 0)
    with torch.no_grad():
        assert [once(module, "a", lambda: next(made)) for _ in range(2)] == [5, 6]


@pytest.mark.parametrize("flow", [Glow((3, 16, 16), 2, 2, 8), RealNVP((3, 16, 16), 2, 8, 1)], ids=["Glow", "RealNVP"])
def test_images_stay_channels_last_through_every_coupling(flow):
    seen = []
    for module in (m for m in flow.modules() if hasattr(m, "conditioner")):
        module.register_forward_hook(lambda module, inputs, y: seen.extend([inputs[0], y[0]]))
        module.conditioner.register_forward_hook(lambda module, inputs, y: seen.append(inputs[0]))
    z, _ = flow(torch.rand(2, 3, 16, 16))
    flow.inverse(z)
    assert len(seen) >= 16
    ours = [x for x in seen if x.shape[1] > 1]
    assert all(x.stride(1) == 1 for x in ours)  # a half of the channels is a view with gaps


def test_a_block_within_a_block_and_a_copy_made_in_one():
    module, made = torch.nn.Linear(2, 2), itertools.count()
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
        with torch.no_grad():
            flow.initialize(x)
        expected = loss_and_gradients(flow, x)
        flow.compile()
        for a, b in zip(loss_and_gradients(flow, x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        return counters["stats"]["unique_graphs"]

    assert graphs(1) == graphs(3) == 2


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: Glow((3, 8, 8), 3, 1, 6), lambda: RealNVP((3, 8, 8), 2, 6, 1)])
@pytest.mark.parametrize("lean", [False, True])
def test_a_compiled_flow_stays_compiled_through_validation_and_training(make, lean, monkeypatch):
    """Full and partial batches without gradients, compiled and as a run evaluates, then training: all compiled."""
    torch.compiler.reset()
    torch.manual_seed(0)
    flow, x = make(), torch.rand(6, 3, 8, 8)
    with torch.no_grad():
        flow.initialize(x)
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
    monkeypatch.setattr(GlowConditioner, "_weights", noted(GlowConditioner._weights, eager))
    monkeypatch.setattr(ResidualBlock, "forward", noted(ResidualBlock.forward, eager))
    for a, b in zip(loss_and_gradients(flow.train(), x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert eager == []
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(flow.state_dict()[name], value, rtol=1e-4, atol=1e-4)


def noted(method, calls):
    """Notes calls that are run and not compiled."""

    def wrapped(self, *arguments):
        if not torch.compiler.is_compiling():
            calls.append(self)
        return method(self, *arguments)

    return wrapped


def test_networks_are_folded_together_as_each_alone():
    nets = [perturb(GlowConditioner(2, 6, 5, (4, 6)), 0.3).double() for _ in range(3)]
    x = randn(3, 2, 4, 6)
    for net, folded in zip(nets, GlowConditioner.fold(nets), strict=True):
        torch.testing.assert_close(net(x, folded), net(x), rtol=1e-12, atol=1e-12)
    assert (nets[0](x) - nets[1](x)).abs().max() > 0.1
