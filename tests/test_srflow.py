"""SRFlow: the map of the authors' code, its encoder, its sizes, and what it keeps in memory."""

import copy
import math

import pytest
import torch
from cases import perturb
from test_fast_paths import by_autograd
from torch.nn import functional as F

from datamodules.bicubic import downscale
from datamodules.photos import photographs
from flows.context import Encoded
from flows.coupling import AffineInjector, SigmoidCoupling
from flows.normalization import ActNorm
from flows.recompute import recompute
from flows.reshape import unshuffled
from flows.srflow import RRDB, RRDBEncoder, SRFlow, padded
from flows.srflow import dense as dense_blocks
from flows.srflow.dense import DenseBlock
from flows.srflow.steps import ConditionalSteps, parts

TINY = {
    "depth": 2,
    "hidden_channels": 5,
    "encoder_blocks": 2,
    "encoder_channels": 4,
    "encoder_growth": 3,
    "stacked": (0, 1),
}


def srflow(**options):
    """A flow in float64 whose weights are not the initial ones, eight images, and low_res."""
    torch.manual_seed(0)
    flow = SRFlow(**TINY | options).double()
    x = torch.rand(8, 3, 16, 24, dtype=torch.float64)
    low_res = torch.rand(8, 3, 16 // flow.scale, 24 // flow.scale, dtype=torch.float64)
    flow.initialize(x, low_res)
    return perturb(flow, 0.03), x, low_res


# ---------------------------------------------------------------- the map, written out


def actnorm(norm, x):
    """y and the sum of logs: the factor of the log-scale is 1."""
    return (x + norm.bias) * norm.log_scale.exp(), norm.log_scale.sum()


def network(net, x):
    """F of the authors' code: two convolutions with actnorms, and one that starts at 0."""
    h = F.conv2d(x, net.conv_in.weight, padding=1)
    h = actnorm(net.norm_in, h)[0].relu()
    h = actnorm(net.norm_mid, F.conv2d(h, net.conv_mid.weight))[0].relu()
    last = net.conv_out
    h = (F.conv2d(h, last.weight, padding=1) + last.shift) * torch.exp(3 * last.log_scale)
    return h.chunk(2, dim=1)


def conditional_step(third, x, u):
    """The injector and the coupling, without the library's own classes; log_det is (B,)."""
    injector, coupling = parts(third)
    shift, raw = network(injector.conditioner, u)
    scale = torch.sigmoid(raw + 2) + 1e-4
    x = (x + shift) * scale
    log_det = scale.log().sum((1, 2, 3))
    z1, z2 = x.chunk(2, dim=1)
    shift, raw = network(coupling.conditioner, torch.cat([z1, u], dim=1))
    scale = torch.sigmoid(raw + 2) + 1e-4
    return torch.cat([z1, (z2 + shift) * scale], dim=1), log_det + scale.log().sum((1, 2, 3))


def written_out(flow, x, features):
    """log p(x | features) of a model with three levels and plain 1x1 convolutions, (B,)."""
    total = torch.zeros(len(x), dtype=x.dtype)
    for i, (level, u) in enumerate(zip(flow.levels, features, strict=True)):
        _, transition, steps, *split = level.layers
        x = unshuffled(x)
        pixels = x.shape[2] * x.shape[3]
        layers = [*transition.layers, *steps.layers]
        for norm, conv, third in zip(layers[::3], layers[1::3], layers[2::3], strict=True):
            x, log_scale = actnorm(norm, x)
            x = torch.einsum("ij,bjhw->bihw", conv.weight, x)
            total = total + pixels * (log_scale + torch.linalg.slogdet(conv.weight).logabsdet)
            if parts(third):
                x, log_det = conditional_step(third, x, u)
                total = total + log_det
        assert bool(split) == (i == 0)  # the last two levels stay together
        if split:
            net = split[0].net
            x, z = x.chunk(2, dim=1)
            h = (F.conv2d(x, net.weight, padding=1) + net.shift) * torch.exp(3 * net.log_scale)
            mean, log_std = h.chunk(2, dim=1)
            prior = torch.distributions.Normal(mean, log_std.exp())
            total = total + prior.log_prob(z).sum((1, 2, 3))
    return total + torch.distributions.Normal(0, 1).log_prob(x).sum((1, 2, 3))


def test_the_likelihood_is_that_of_the_map_written_out():
    flow, x, low_res = srflow(permutation="invertible_plain")
    ours = flow.log_prob(x, low_res)
    torch.testing.assert_close(ours, written_out(flow, x, flow.context_encoder(low_res)))
    assert ours.std() > 1


def test_at_first_every_scale_is_that_of_the_authors_code():
    """sigmoid(2) + 1e-4, and not 1e-4 + (1 - 1e-4) sigmoid(2)."""
    flow = SRFlow(**TINY)
    layers = [m for m in flow.modules() if type(m) in (SigmoidCoupling, AffineInjector)]
    assert len(layers) == 2 * 3 * 2
    for layer in layers:
        y, _, (scale,) = layer.change(torch.ones(1, 2, 1, 1), torch.zeros(1, 4, 1, 1))
        torch.testing.assert_close(scale, torch.full_like(scale, 1 / (1 + math.exp(-2)) + 1e-4))
        assert torch.equal(y, scale)


@pytest.mark.parametrize("raw", [-200.0, -3.0, 0.0, 4.0, 200.0])
def test_the_gradient_of_a_bounded_scale_is_that_of_autograd(raw):
    coupling = SigmoidCoupling(torch.nn.Identity(), 0.1, 1.1)
    h = torch.tensor([0.3, raw], dtype=torch.float64).view(1, 2, 1, 1).requires_grad_()
    x = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64, requires_grad=True)
    y, log_det, state = coupling.change(x, h)
    grad_y = torch.full_like(y, 1.3)
    grad_log_det = torch.full_like(log_det, -0.6)
    theirs = torch.autograd.grad([y, log_det], [x, h], [grad_y, grad_log_det])
    ours = coupling.gradients(grad_y, grad_log_det, y.detach(), *(s.detach() for s in state))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-12)


def test_initialize_gives_every_actnorm_mean_0_and_variance_1_with_factor_1():
    torch.manual_seed(0)
    flow = SRFlow(**TINY)
    x = 0.3 + 0.2 * torch.rand(16, 3, 16, 16)
    flow.initialize(x, torch.rand(16, 3, 4, 4))
    norms = [module for module in flow.modules() if isinstance(module, ActNorm)]
    assert len(norms) == 3 * (2 + 2 * (1 + 2 * 2))
    assert {norm.log_scale_factor for norm in norms} == {1.0}
    assert all(norm.initialized for norm in norms)
    first = next(norm for norm in norms if len(norm.bias) == 12)
    y = first.normalize(unshuffled(x))
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(12), rtol=0, atol=1e-4)
    torch.testing.assert_close(y.std((0, 2, 3)), torch.ones(12), rtol=0, atol=1e-3)


# ---------------------------------------------------------------- the encoder


def conv(layer, x):
    return F.conv2d(x, layer.weight, layer.bias, padding=1)


def block_written_out(block, x):
    h = x
    for dense in block.blocks:
        c1, c2, c3, c4, c5 = dense.convs
        x1 = F.leaky_relu(conv(c1, h), 0.2)
        x2 = F.leaky_relu(conv(c2, torch.cat([h, x1], 1)), 0.2)
        x3 = F.leaky_relu(conv(c3, torch.cat([h, x1, x2], 1)), 0.2)
        x4 = F.leaky_relu(conv(c4, torch.cat([h, x1, x2, x3], 1)), 0.2)
        h = h + 0.2 * conv(c5, torch.cat([h, x1, x2, x3, x4], 1))
    return x + 0.2 * h


def test_features_and_image_are_those_written_out():
    """For 8x with four levels: f_4, f_2, f_1 and half of its size, then two blocks' outputs."""
    torch.manual_seed(0)
    network = perturb(RRDB(8, n_blocks=3, channels=4, growth=3), 0.1).double()
    encoder = RRDBEncoder(8, 3, 4, 3, stacked=(0, 2), n_levels=4).double()
    encoder.load_state_dict(network.encoder.state_dict())
    low_res = torch.rand(2, 3, 4, 6, dtype=torch.float64)
    first = conv(encoder.conv_in, low_res)
    outputs = [first]
    for block in encoder.blocks:
        outputs.append(block_written_out(block, outputs[-1]))
    f1 = first + conv(encoder.conv_trunk, outputs[-1])

    def up(x):
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    f2 = conv(encoder.upsamplings[0], up(f1))  # kept before LeakyReLU
    f4 = conv(encoder.upsamplings[1], up(F.leaky_relu(f2, 0.2)))
    half = F.avg_pool2d(f1, 2)  # what bilinear interpolation by 1/2 is
    a = outputs[1]
    b = outputs[3]
    expected = [
        torch.cat([f4, up(up(a)), up(up(b))], 1),
        torch.cat([f2, up(a), up(b)], 1),
        torch.cat([f1, a, b], 1),
        torch.cat([half, a[..., ::2, ::2], b[..., ::2, ::2]], 1),
    ]
    for ours, theirs in zip(encoder(low_res), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    f8 = F.leaky_relu(conv(network.upsampling, up(F.leaky_relu(f4, 0.2))), 0.2)
    image = conv(network.conv_out, F.leaky_relu(conv(network.conv_hidden, f8), 0.2))
    torch.testing.assert_close(network(low_res), image, rtol=1e-9, atol=1e-9)


def test_dense_blocks_start_small():
    """He et al. times .1: the outputs of a deep encoder stay near its input."""
    torch.manual_seed(0)
    block = DenseBlock(64, 32)
    for layer in block.convs:
        expected = 0.1 * math.sqrt(2 / (layer.in_channels * 9))
        assert abs(layer.weight.std().item() / expected - 1) < 0.02
        assert not layer.bias.any()


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_flow_takes_the_encoder_of_a_pre_trained_network(scale):
    torch.manual_seed(0)
    network = RRDB(scale, n_blocks=2, channels=4, growth=3)
    flow = SRFlow(**TINY | {"scale": scale})
    weights = network.state_dict()
    of_encoder = {
        name.removeprefix("encoder."): value
        for name, value in weights.items()
        if name.startswith("encoder.")
    }
    flow.context_encoder.load_state_dict(of_encoder)
    low_res = torch.rand(1, 3, 8, 8)
    trunk, _ = network.encoder.trunk(low_res)
    assert torch.equal(flow.context_encoder.trunk(low_res)[0], trunk)
    network(low_res).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())


def test_one_encoding_serves_all_samples_and_images():
    flow, x, low_res = srflow()
    encoding = flow.eval().encode_context(low_res)
    assert isinstance(encoding, Encoded)
    assert torch.equal(flow.log_prob(x, encoding), flow.log_prob(x, low_res))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    first = flow.sample(2, 0.8, encoding, generator=generators[0])
    assert torch.equal(first, flow.sample(2, 0.8, low_res, generator=generators[1]))


# ---------------------------------------------------------------- sizes and counts


@pytest.mark.parametrize(
    ("options", "encoder", "flow"),
    [
        ({}, 16_697_987, 22_843_824),
        ({"scale": 8, "n_levels": 4, "stacked": (1, 3, 5, 7)}, 16_734_915, 34_086_976),
        (
            {"scale": 8, "n_levels": 4, "stacked": (1, 3, 5, 7), "encoder_blocks": 8},
            5_943_555,
            34_086_976,
        ),
    ],
    ids=["DF2K-4x", "DF2K-8x", "CelebA-8x"],
)
def test_parameters_are_those_of_the_released_models(options, encoder, flow):
    """Without the 352,163 that get no gradient there: an image's layers, and unused ones."""
    image_layers = 2 * (64 * 64 * 9 + 64) + 64 * 3 * 9 + 3
    unused = 352_163 - image_layers
    with torch.device("meta"):
        model = SRFlow(permutation="invertible_plain", **options)
        network = RRDB(model.scale, len(model.context_encoder.blocks))
    of_encoder = count(model.context_encoder)
    assert of_encoder == encoder - image_layers
    assert count(model) - of_encoder == flow - unused
    assert count(network) == encoder


def test_a_decomposed_1x1_convolution_has_a_surplus_of_unused_parameters():
    """L and U are C x C matrices with zeros on and beyond the diagonal: C^2 + C are not used."""
    plain = count(SRFlow(permutation="invertible_plain", **TINY))
    n_steps = 2 + 2
    surplus = n_steps * sum(c * c + c for c in (12, 24, 96))
    assert count(SRFlow(**TINY)) == plain + surplus


def count(module):
    """The number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def test_latents_at_the_sizes_of_the_paper():
    four = SRFlow(**TINY)
    eight = SRFlow(**TINY | {"scale": 8, "n_levels": 4})
    assert four.latent_shapes((3, 160, 160)) == ((6, 80, 80), (96, 20, 20))
    assert eight.latent_shapes((3, 160, 160)) == ((6, 80, 80), (12, 40, 40), (192, 10, 10))
    assert four.latent_shapes() == ((6, None, None), (96, None, None))


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("n_levels", [1, 2, 3, 4])
def test_any_scale_and_number_of_levels_is_invertible(scale, n_levels):
    torch.manual_seed(0)
    flow = SRFlow(**TINY | {"scale": scale, "n_levels": n_levels, "depth": 1}).double()
    x = torch.rand(2, 3, 32, 16, dtype=torch.float64)
    low_res = torch.rand(2, 3, 32 // scale, 16 // scale, dtype=torch.float64)
    perturb(flow, 0.02)
    latents, log_det = flow(x, low_res)
    assert len(latents) == max(1, n_levels - 1)
    back, inverse_log_det = flow.inverse(latents, low_res)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(inverse_log_det, -log_det)


@pytest.mark.parametrize(("n_levels", "scale"), [(3, 4), (4, 8)])
def test_the_round_trip_at_the_paper_s_depth_is_exact_at_first(n_levels, scale):
    torch.manual_seed(0)
    flow = SRFlow(**TINY | {"depth": 16, "scale": scale, "n_levels": n_levels})
    x = torch.rand(8, 3, 32, 32)
    low_res = torch.rand(8, 3, 32 // scale, 32 // scale)
    flow.initialize(x, low_res)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        flow = flow.to(dtype)
        latents, _ = flow(x.to(dtype), low_res.to(dtype))
        back, _ = flow.inverse(latents, low_res.to(dtype))
        assert (back - x.to(dtype)).abs().max() < bound


def test_low_res_of_another_size_is_one_line():
    flow, x, low_res = srflow()
    request = "images of 16x24 pixels need low_res of 1/4 of their sides as context, not of"
    latents, _ = flow(x, low_res)
    for wrong, sides in ((low_res[..., :4], "4x4"), (F.pad(low_res, (0, 2)), "4x8")):
        for method, value in ((flow.log_prob, x), (flow.inverse, latents), (flow.initialize, x)):
            with pytest.raises(ValueError, match=f"{request} {sides}") as error:
                method(value, wrong)
            assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=f"{request} 4x4"):
        flow.log_prob(x, flow.encode_context(low_res[..., :4]))
    with pytest.raises(ValueError, match=r"low_res is 4x5, .* multiples of 2: pad it by"):
        flow.sample(1, context=low_res[..., :5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 3}, "flow.scale=3 is out of range: give 2, 4, 8 or 16"),
        ({"stacked": (0, 2)}, r"flow.stacked=\[0, 2\] names blocks .* from 0 to 1"),
        ({"stacked": (1, 0)}, r"flow.stacked=\[1, 0\]: give increasing numbers"),
        ({"depth": 0}, "flow.depth=0 is out of range"),
        ({"transition_depth": -1}, "flow.transition_depth=-1 is out of range"),
        ({"encoder_growth": 0}, "flow.encoder_growth=0 is out of range"),
        ({"permutation": "lu"}, "flow.permutation=lu is not known: give one of"),
        ({"min_scale": 1.5}, "flow.min_scale=1.5 is out of range"),
        ({"shape": (1, 16, 16)}, "SRFlow models images of 3 channels, not of 1"),
        ({"shape": (3, 16, 20)}, "halves a 16x20 image to odd sizes"),
        ({"shape": (3, 8, 12), "scale": 8, "n_levels": 2}, "multiples of 8, not 8x12"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        SRFlow(**TINY | options)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- images of any size


@pytest.mark.parametrize(("height", "width", "multiple"), [(5, 7, 2), (1, 3, 4), (3, 2, 8)])
def test_padding_mirrors_and_keeps_the_image(height, width, multiple):
    images = torch.rand(2, 3, height, width)
    result, size = padded(images, multiple)
    assert size == (height, width)
    assert torch.equal(result[..., :height, :width], images)
    assert {side % multiple for side in result.shape[-2:]} == {0}
    assert max(result.shape[-2] - height, result.shape[-1] - width) < multiple

    def mirrored(i, side):
        period = max(1, 2 * side - 2)
        return min(i % period, -i % period)

    for i in range(result.shape[-2]):
        for j in range(result.shape[-1]):
            own = images[..., mirrored(i, height), mirrored(j, width)]
            assert torch.equal(result[..., i, j], own)


def test_an_image_that_fits_is_not_padded():
    images = torch.rand(1, 3, 4, 6)
    result, size = padded(images, 2)
    assert result is images
    assert size == (4, 6)


def test_an_image_of_odd_sides_is_padded_then_cropped():
    flow, _, _ = srflow()
    low_res = torch.rand(1, 3, 5, 3, dtype=torch.float64)
    whole, (height, width) = padded(low_res, flow.context_encoder.multiple)
    samples = flow.sample(2, 0.0, whole)[..., : 4 * height, : 4 * width]
    assert samples.shape == (2, 1, 3, 20, 12)
    assert samples.isfinite().all()


# ---------------------------------------------------------------- gradients and memory


OPTIONS = [{}, {"injector": False}, {"min_scale": 0.1}, {"transition_depth": 0}]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def plain_dense(monkeypatch):
    """Let autograd compute the gradients of dense blocks."""

    def apply(dtype, x, *layers):
        y, _ = dense_blocks.dense(dtype, x, *layers)
        return y

    monkeypatch.setattr(dense_blocks.DenseFunction, "apply", apply)


@every_option
@pytest.mark.parametrize("lean", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_gradients_by_hand_are_those_of_autograd(options, lean, frozen, monkeypatch):
    """Of x, low_res and all weights; without those of a frozen encoder."""
    flow, x, low_res = srflow(**options)
    plain = by_autograd(flow)
    if lean:
        recompute(flow)
    results = []
    for f in (flow, plain):
        images = x.clone().requires_grad_()
        small = low_res.clone().requires_grad_()
        with torch.set_grad_enabled(not frozen):
            encoding = f.encode_context(small)
        f.log_prob(images, encoding).square().mean().mul(1e-4).backward()
        results.append([images.grad, small.grad, *(p.grad for p in f.parameters())])
        plain_dense(monkeypatch)
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    n_missing = sum(gradient is None for gradient in results[0])
    assert n_missing == frozen * (1 + len(list(flow.context_encoder.parameters())))


@every_option
def test_gradients_by_hand_can_be_differentiated_again(options, monkeypatch):
    flow, x, low_res = srflow(**options)
    x = x[:2]
    low_res = low_res[:2]
    results = []
    for f in (flow, by_autograd(flow)):
        small = low_res.clone().requires_grad_()
        log_prob = f.log_prob(x, small).sum()
        (score,) = torch.autograd.grad(log_prob, small, create_graph=True)
        inputs = [small, *f.parameters()]
        results.append(torch.autograd.grad(score.square().mean(), inputs, materialize_grads=True))
        plain_dense(monkeypatch)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)
    assert results[0][0].abs().max() > 1e-6


def kept_bytes(flow, x, low_res, frozen=False):
    """The bytes that the graph of a loss keeps besides weights and data, for one image."""
    own = {t.untyped_storage().data_ptr() for t in (*flow.parameters(), *flow.buffers(), x)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.set_grad_enabled(not frozen):
            encoding = flow.encode_context(low_res)
        loss = flow.log_prob(x, encoding).mean()
    total = sum(kept.values()) / len(x)
    del loss
    return total


def test_a_step_keeps_its_hidden_layers_and_little_else():
    """One image of 8x8 at a step: floats of the hidden layers, of states, and of the context."""
    torch.manual_seed(0)
    flow = SRFlow(**TINY | {"n_levels": 1, "depth": 4, "hidden_channels": 7, "transition_depth": 0})
    (steps,) = (m for m in flow.modules() if isinstance(m, ConditionalSteps))
    x = torch.rand(1, 3, 16, 16)
    features = torch.rand(1, 12, 8, 8)
    encoding = Encoded((features,))
    flow(x, encoding)
    own = {t.untyped_storage().data_ptr() for t in (*flow.parameters(), x)}
    of_pixels = []

    def pack(tensor):
        if tensor.dim() == 4 and tensor.shape[-2:] == (8, 8):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own | {p for p, _ in of_pixels}:
                of_pixels.append((storage.data_ptr(), storage.nbytes()))
        return tensor

    def floats_of_pixel(**settings):
        of_pixels.clear()
        for name, value in settings.items():
            setattr(steps, name, value)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            z, log_det = flow(x, encoding)
        total = sum(n for _, n in of_pixels) / 4 / 64
        del z, log_det
        return total

    # Once x and the features. In each step: y, the injector's output, both scales, four layers.
    assert floats_of_pixel(recompute=False) == 12 + 12 + 4 * (12 + 12 + 12 + 6 + 4 * 7)
    assert floats_of_pixel(recompute=True) == 12 + 12 + 3 * 12
    assert floats_of_pixel(recompute=False, by_hand=False) > 4 * (12 + 4 * 12 + 6 + 4 * 7)


def test_a_dense_block_keeps_its_parts_once():
    """Of 6 + 4 * 3 channels; joined in five ways they would be 60."""
    block = DenseBlock(6, 3)
    x = torch.rand(1, 6, 8, 8).contiguous(memory_format=torch.channels_last)
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x)
    assert sum(kept.values()) == 4 * 64 * (6 + 4 * 3)
    del y


@pytest.mark.slow
def test_the_memory_of_the_paper_s_model_is_within_its_budget():
    """For a crop of 160x160; autograd by itself keeps about 880 MB of the authors' model."""
    torch.manual_seed(0)
    flow = SRFlow()
    x = torch.rand(1, 3, 160, 160)
    low_res = torch.rand(1, 3, 40, 40)
    flow.initialize(x, low_res)
    with torch.autocast("cpu", torch.bfloat16):
        assert kept_bytes(flow, x, low_res) < 880e6 / 3
        assert kept_bytes(flow, x, low_res, frozen=True) < 880e6 / 6
        recompute(flow)
        assert kept_bytes(flow, x, low_res) < 880e6 / 20
        assert kept_bytes(flow, x, low_res, frozen=True) < 880e6 / 20


def test_bf16_reaches_the_networks_and_leaves_the_state_alone():
    """Features, latents and log_det stay float32, and near those without autocast."""
    flow, x, low_res = srflow()
    flow = flow.float()
    x = x.float()
    low_res = low_res.float()
    exact = flow.log_prob(x, low_res)
    with torch.autocast("cpu", torch.bfloat16):
        features = flow.encode_context(low_res)
        rounded = flow.log_prob(x, low_res)
        latents, _ = flow(x, features)
        back, _ = flow.inverse(latents, features)
    assert {f.dtype for f in features.value} == {rounded.dtype} == {torch.float32}
    assert 0 < (rounded - exact).abs().max() < 0.02 * exact.abs().max() + 20
    torch.testing.assert_close(back, x, rtol=0, atol=0.01)
    states = copy.deepcopy(flow.state_dict())
    assert all(torch.equal(value, states[name]) for name, value in flow.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("lean", [False, True], ids=["kept", "recomputed"])
def test_a_compiled_flow_has_the_same_gradients(lean):
    """The networks are compiled, so steps call them and autograd computes their gradients."""
    torch.compiler.reset()
    flow, x, low_res = srflow(depth=1)
    results = []
    for compiled in (False, True):
        if compiled:
            flow.compile(backend="aot_eager")
            if lean:
                recompute(flow)
        flow.zero_grad()
        flow.log_prob(x, low_res).mean().backward()
        results.append([parameter.grad.clone() for parameter in flow.parameters()])
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-8)


def crops(photos, n, side, generator):
    """Random crops (n, 3, side, side) and their low_res, of a quarter of the sides, in [0, 1]."""
    images = []
    for _ in range(n):
        photo = torch.from_numpy(photos[int(torch.randint(len(photos), (), generator=generator))])
        top, left = (
            int(torch.randint(length - side + 1, (), generator=generator))
            for length in photo.shape[:2]
        )
        images.append(photo[top : top + side, left : left + side].permute(2, 0, 1))
    high_res = torch.stack(images)
    return high_res / 255, downscale(high_res, 4) / 255


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_training_on_photographs_stays_finite_and_exact(seed):
    """1,000 steps; with the scale of 1e-4 samples reach 1e21 in fewer, and of .1 they do not."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    encoder = {"encoder_blocks": 2, "encoder_channels": 16, "encoder_growth": 8}
    flow = SRFlow(**TINY | encoder | {"depth": 4, "hidden_channels": 16, "min_scale": 0.1})
    photos = photographs()
    flow.initialize(*crops(photos, 32, 32, generator))
    optimizer = torch.optim.Adam(flow.parameters(), lr=2.5e-4)
    noise = 4 / math.sqrt(3) / 255
    for step in range(1, 1001):
        x, low_res = crops(photos, 4, 32, generator)
        x = x + noise * torch.randn(x.shape, generator=generator)
        loss = -flow.log_prob(x, low_res).mean() / x[0].numel()
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite(), step
        assert all(p.grad.isfinite().all() for p in flow.parameters()), step
        optimizer.step()
        if step in (500, 1000):
            with torch.no_grad():
                latents, _ = flow(x, low_res)
                back, _ = flow.inverse(latents, low_res)
                assert (back - x).abs().max() < 1e-4
                for temperature in (0.0, 0.9, 1.0):
                    samples = flow.sample(4, temperature, low_res, generator=generator)
                    assert samples.abs().max() < 10
    assert loss < -2  # nats per value of [0, 1]: below 5.2 bits per grey level
