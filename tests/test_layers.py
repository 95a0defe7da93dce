"""Each layer against its definition, computed by hand."""

import math

import pytest
import torch
from cases import perturb
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flows.base import Compose
from flows.conditioners import (
    BiasOnlyBatchNorm2d,
    MLPConditioner,
    ResidualConditioner,
    WeightNormConv2d,
)
from flows.coupling import AdditiveCoupling, ChannelCoupling, MaskedCoupling, SigmoidCoupling
from flows.elementwise import Logit, Shift
from flows.glow.conditioner import GlowConditioner
from flows.glow.edges import EdgeConv2d, ZeroConv2d, ZeroLinear
from flows.glow.priors import SplitPrior, TopPrior
from flows.likelihood import bits_per_dim
from flows.linear import (
    ChannelPermutation,
    InvertibleConv1x1,
    InvertibleConv1x1LU,
    matrices,
    rotation,
)
from flows.masks import checkerboard
from flows.normalization import ActNorm, CouplingBatchNorm, uninitialized
from flows.reshape import OrderedSqueeze, Squeeze, factor_in, factor_out

EPS = 1e-4


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance
    )


# bits per dimension


@pytest.mark.parametrize("n_bits", [5, 8])
def test_a_uniform_density_costs_exactly_n_bits(n_bits):
    assert torch.equal(bits_per_dim(torch.zeros(3), 3072, n_bits), torch.full((3,), float(n_bits)))


def test_bits_per_dim_is_linear_in_nats():
    n_dims = 12
    log_prob = torch.tensor([-1.0, 1.0, 2.5], dtype=torch.float64) * n_dims * math.log(2)
    assert_close(bits_per_dim(log_prob, n_dims, 8), torch.tensor([9.0, 7.0, 5.5]))
    # By the nats of the discrete image, whose bins have the volume 256^-D.
    nats = n_dims * math.log(256) - log_prob
    assert_close(bits_per_dim(log_prob, n_dims, 8), nats / (n_dims * math.log(2)))


# Logit


@pytest.mark.parametrize("alpha", [0.05, 1e-6, 0.3])
def test_logit_log_det_is_the_sum_of_elementwise_derivatives(alpha):
    x = randn(4, 2, 3).sigmoid().requires_grad_()
    y, log_det = Logit(alpha)(x)
    (derivative,) = torch.autograd.grad(y.sum(), x)
    assert_close(log_det, derivative.log().flatten(1).sum(1), 1e-8)


@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_logit_maps_the_unit_interval_onto_alpha_to_one_minus_alpha(alpha):
    ends = torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.float64)
    y, log_det = Logit(alpha)(ends)
    assert_close(y.sigmoid(), [[alpha, 0.5, 1 - alpha]])
    assert y.isfinite().all()
    assert log_det.isfinite().all()
    assert_close(Logit(alpha).inverse(y)[0], ends)


def test_logit_by_hand():
    """The authors' alpha + (1 - 2 alpha) x, not the paper's alpha + (1 - alpha) x."""
    y, log_det = Logit()(torch.tensor([[0.25]], dtype=torch.float64))
    p = 0.05 + 0.9 * 0.25
    assert_close(y, [[math.log(p / (1 - p))]])
    assert_close(log_det, [math.log(0.9 / (p * (1 - p)))])


@pytest.mark.parametrize("alpha", [-0.01, 0.5, 0.7])
def test_logit_refuses_an_alpha_that_leaves_no_interval(alpha):
    with pytest.raises(ValueError, match=str(alpha)):
        Logit(alpha)


# Squeezes

even_images = st.tuples(*(st.integers(1, n) for n in (3, 4, 3, 3))).map(
    lambda s: randn(s[0], s[1], 2 * s[2], 2 * s[3])
)


@settings(max_examples=20, deadline=None, database=None)
@given(even_images)
def test_squeeze_puts_pixel_dy_dx_of_channel_c_into_channel_4c_plus_2dy_plus_dx(x):
    z, log_det = Squeeze()(x)
    for c in range(x.shape[1]):
        for dy in range(2):
            for dx in range(2):
                assert torch.equal(z[:, c * 4 + dy * 2 + dx], x[:, c, dy::2, dx::2])
    assert z.shape[1] == 4 * x.shape[1]
    assert torch.equal(log_det, torch.zeros(len(x)))
    assert torch.equal(Squeeze().inverse(z)[0], x)


@settings(max_examples=20, deadline=None, database=None)
@given(even_images)
def test_ordered_squeeze_is_top_left_bottom_right_top_right_bottom_left(x):
    channels = x.shape[1]
    squeeze = OrderedSqueeze(channels)
    z, log_det = squeeze(x)
    for block, (dy, dx) in enumerate([(0, 0), (1, 1), (0, 1), (1, 0)]):
        for c in range(channels):
            assert torch.equal(z[:, block * channels + c], x[:, c, dy::2, dx::2])
    assert torch.equal(log_det, torch.zeros(len(x)))
    assert torch.equal(squeeze.inverse(z)[0], x)


def test_ordered_squeeze_factors_out_one_colour_of_the_checkerboard():
    kept, latent = factor_out(OrderedSqueeze(3)(checkerboard(4, 6, 1).expand(1, 3, 4, 6))[0])
    assert (kept == 1).all()
    assert (latent == 0).all()
    x = randn(2, 6, 2, 2)
    assert torch.equal(factor_in(*factor_out(x)), x)


@pytest.mark.parametrize("parity", [0, 1])
def test_checkerboard(parity):
    board = checkerboard(3, 4, parity)
    assert board[0, 0] == parity
    for row in range(3):
        for column in range(4):
            assert board[row, column] == (parity + row + column) % 2
    assert torch.equal(board + checkerboard(3, 4, 1 - parity), torch.ones(3, 4))


# Convolutions and normalisation of the conditioners


def effective_weight(conv):
    """The weight that a convolution applies: its response to one-hot images, without its bias."""
    k = conv.kernel_size[0]
    c = conv.in_channels
    x = torch.zeros(c * k * k, c, k, k)
    for i in range(c * k * k):
        x.view(c * k * k, -1)[i, i] = 1
    centre = (conv(x) - conv(torch.zeros_like(x)))[:, :, k // 2, k // 2]
    return centre.T.reshape(conv.out_channels, c, k, k)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_weight_norm_without_magnitude_has_unit_norm_per_output_channel(kernel_size):
    conv = perturb(WeightNormConv2d(5, 4, kernel_size))
    assert conv.magnitude is None
    weight = effective_weight(conv)
    assert_close(weight.flatten(1).norm(dim=1), torch.ones(4), 1e-5)
    norm = conv.weight.flatten(1).norm(dim=1)
    assert_close(weight, conv.weight / norm[:, None, None, None], 1e-6)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_weight_norm_with_magnitude_has_it_as_its_norm(kernel_size):
    conv = WeightNormConv2d(5, 4, kernel_size, magnitude=True)
    start = math.sqrt(2 / 5) * math.sqrt(5 * kernel_size**2 / 12)
    assert_close(conv.magnitude.flatten(), torch.full((4,), start), 1e-6)
    magnitude = torch.tensor([0.5, 1.0, 2.0, 3.0])
    conv.magnitude.data = magnitude[:, None, None, None]
    assert_close(effective_weight(conv).flatten(1).norm(dim=1), magnitude, 1e-5)


def test_weight_norm_initialisation():
    torch.manual_seed(0)
    conv = WeightNormConv2d(50, 40, 3)
    bound = math.sqrt(2 / 50)
    assert conv.weight.abs().max() <= bound
    uniform_std = bound / math.sqrt(3)
    assert abs(conv.weight.std() / uniform_std - 1) < 0.02
    assert (conv.bias == 0).all()
    assert WeightNormConv2d(5, 4, 3, bias=False).bias is None


def test_bias_only_batch_norm_has_a_beta_and_no_gamma():
    norm = BiasOnlyBatchNorm2d(3).double()
    assert [name for name, _ in norm.named_parameters()] == ["bias"]
    perturb(norm)
    x = 2 + 3 * randn(4, 3, 5, 2)
    mean = x.mean((0, 2, 3))
    var = x.var((0, 2, 3), correction=0)
    std = (var + EPS).sqrt()
    expected = (x - mean[:, None, None]) / std[:, None, None] + norm.bias[:, None, None]
    assert_close(norm(x), expected)
    assert_close(norm.running_mean, 0.1 * mean)
    # torch's running variance is the unbiased one.
    assert_close(norm.running_var, 0.9 + 0.1 * var * 40 / 39)


@pytest.mark.parametrize("masked", [True, False])
def test_residual_conditioner_by_hand(masked):
    """The whole network; it is perturbed, since initial biases are 0."""
    mask = None
    x = randn(3, 2, 4, 4)
    if masked:
        mask = checkerboard(4, 4, 1).double()
        x = x * mask
    net = perturb(ResidualConditioner(2, 5, 2, mask)).double()

    def norm(h, layer):
        mean = h.mean((0, 2, 3), keepdim=True)
        var = h.var((0, 2, 3), correction=0, keepdim=True)
        return (h - mean) / (var + EPS).sqrt() + layer.bias[:, None, None]

    def conv(h, layer):
        weight = layer.weight / layer.weight.flatten(1).norm(dim=1)[:, None, None, None]
        if layer.magnitude is not None:
            weight = weight * layer.magnitude
        return nn.functional.conv2d(h, weight, layer.bias, padding="same")

    h = norm(x, net.bn_in)
    channels = [h, -h]
    if masked:
        channels = [2 * h, -2 * h, mask.expand(3, 1, 4, 4)]
    h = conv(torch.cat(channels, 1).relu(), net.conv_in)
    out = conv(h, net.skips[0])
    for k in range(2):
        bn1, _, conv1, bn2, _, conv2 = net.blocks[k].layers
        assert conv1.bias is None
        assert conv1.magnitude is None
        h = h + conv(norm(conv(norm(h, bn1).relu(), conv1), bn2).relu(), conv2)
        out = out + conv(h, net.skips[k + 1])
    expected = conv(norm(out, net.bn_out).relu(), net.conv_out)
    shift, log_scale = net(x)
    assert_close(torch.cat([shift, log_scale], 1), expected)
    with_magnitude = {
        name for name, m in net.named_modules() if getattr(m, "magnitude", None) is not None
    }
    assert with_magnitude == {
        "blocks.0.layers.5",
        "blocks.1.layers.5",
        "skips.0",
        "skips.1",
        "skips.2",
        "conv_out",
    }


# Batch normalisation as a bijection


def moments(x, mask):
    """Mean and biased variance per channel; kept positions count as zeros."""
    n = x[:, 0].numel()
    x = x * mask
    mean = x.sum((0, 2, 3)) / n
    return mean, x.square().sum((0, 2, 3)) / n - mean.square()


def normalised(x, mean, var, mask):
    y = (x - mean[:, None, None]) / (var + EPS).sqrt()[:, None, None]
    return torch.where(mask.bool(), y, x)


MASKS = {"mask": checkerboard(4, 6, 0), "no-mask": None}


@pytest.fixture(params=MASKS)
def batch_norm(request):
    """The layer and its mask; ones if it has none."""
    mask = MASKS[request.param]
    norm = CouplingBatchNorm(3, mask).double()
    if mask is None:
        mask = torch.ones(4, 6)
    return norm, mask.double()


def shifted(seed=0):
    return 2 + 3 * randn(5, 3, 4, 6, seed=seed)


def test_coupling_batch_norm_normalises_by_the_batch_in_training(batch_norm):
    norm, mask = batch_norm
    x = shifted()
    y, log_det = norm(x)
    mean, var = moments(x, mask)
    assert_close(y, normalised(x, mean, var, mask))
    assert torch.equal(y * (1 - mask), x * (1 - mask))
    # The sum is over the changed elements.
    assert_close(log_det, (-0.5 * (var + EPS).log().sum() * mask.sum()).expand(5), 1e-8)


def test_coupling_batch_norm_without_mask_gives_zero_mean_and_unit_variance():
    y, _ = CouplingBatchNorm(3).double()(shifted())
    assert_close(y.mean((0, 2, 3)), torch.zeros(3))
    assert_close(y.var((0, 2, 3), correction=0), torch.ones(3), 1e-4)


def test_coupling_batch_norm_running_averages(batch_norm):
    norm, mask = batch_norm
    old_mean = norm.running_mean.copy_(randn(3)).clone()
    old_var = norm.running_var.fill_(2.0).clone()
    norm(shifted())
    mean, var = moments(shifted(), mask)
    assert_close(norm.running_mean, 0.9 * old_mean + 0.1 * mean)
    assert_close(norm.running_var, 0.9 * old_var + 0.1 * var)


def test_coupling_batch_norm_uses_running_statistics_in_eval_and_leaves_them(batch_norm):
    norm, mask = batch_norm
    for seed in range(3):
        norm(shifted(seed))
    norm.eval()
    mean = norm.running_mean.clone()
    var = norm.running_var.clone()
    x = -4 + randn(5, 3, 4, 6, seed=9)
    y, log_det = norm(x)
    assert_close(y, normalised(x, mean, var, mask))
    assert_close(log_det, (-0.5 * (var + EPS).log().sum() * mask.sum()).expand(5), 1e-8)
    assert_close(norm.inverse(y)[0], x)
    assert torch.equal(norm.running_mean, mean)
    assert torch.equal(norm.running_var, var)


def test_coupling_batch_norm_inverse_uses_running_statistics_also_in_training(batch_norm):
    norm, _ = batch_norm
    norm(shifted())
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    z = randn(2, 3, 4, 6, seed=4)
    in_training = norm.train().inverse(z)
    in_eval = norm.eval().inverse(z)
    assert torch.equal(in_training[0], in_eval[0])
    assert torch.equal(in_training[1], in_eval[1])
    assert all(torch.equal(value, state[name]) for name, value in norm.state_dict().items())


def test_coupling_batch_norm_gradient_goes_through_the_batch_moments(batch_norm):
    norm, mask = batch_norm
    x = shifted().requires_grad_()
    weight = randn(5, 3, 4, 6, seed=1)
    y, log_det = norm(x)
    (gradient,) = torch.autograd.grad((weight * y).sum() + log_det.sum(), x)
    mean, var = moments(x, mask)
    log_det_by_hand = -0.5 * (var + EPS).log().sum() * mask.sum()
    by_hand = (weight * normalised(x, mean, var, mask)).sum() + 5 * log_det_by_hand
    assert_close(gradient, torch.autograd.grad(by_hand, x)[0], 1e-8)
    detached = (weight * normalised(x, mean.detach(), var.detach(), mask)).sum()
    assert (gradient - torch.autograd.grad(detached, x)[0]).abs().max() > 1e-2


def test_coupling_batch_norm_without_momentum_averages_all_batches(batch_norm):
    """So running averages are estimated anew after training, without the initial values."""
    norm, mask = batch_norm
    norm.momentum = None
    batches = [shifted(seed) * (1 + seed) for seed in range(4)]
    for x in batches:
        norm(x)
    means, variances = zip(*(moments(x, mask) for x in batches), strict=True)
    assert_close(norm.running_mean, torch.stack(means).mean(0), 1e-6)
    assert_close(norm.running_var, torch.stack(variances).mean(0), 1e-5)


# Couplings


class Fixed(nn.Module):
    """A conditioner with a fixed output, which remembers its input."""

    def __init__(self, shift, raw):
        super().__init__()
        self.output = (shift, raw)

    def forward(self, x, context=None):
        self.input = x
        return self.output


def test_masked_coupling_by_hand():
    mask = checkerboard(4, 6, 1).double()
    x = randn(2, 3, 4, 6)
    shift, raw = randn(2, 2, 3, 4, 6, seed=1)
    coupling = MaskedCoupling(mask[None], Fixed(shift, raw), 0.7).double()
    y, log_det = coupling(x)
    a = coupling.log_scale_factor.detach()
    assert_close(a, 0.7, 1e-7)
    expected = torch.where(mask.bool(), x, (x + shift) * (a * raw.tanh()).exp())
    assert_close(y, expected)
    # Kept positions are not scaled.
    assert_close(log_det, (a * raw.tanh())[..., mask == 0].sum((1, 2)))
    assert torch.equal(coupling.conditioner.input, x * mask)
    assert_close(coupling.inverse(y)[0], x)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_masked_coupling_keeps_masked_positions_bit_identical(train):
    mask = checkerboard(4, 6, 0)
    conditioner = ResidualConditioner(2, 4, 1, mask)
    coupling = perturb(
        MaskedCoupling(mask[None], conditioner, 0.0, CouplingBatchNorm(2, 1 - mask))
    ).train(train)
    x = randn(3, 2, 4, 6).float()
    y = coupling(x)[0]
    back = coupling.inverse(x)[0]
    for changed in (y, back):
        assert torch.equal(changed[..., mask == 1], x[..., mask == 1])
        assert (changed[..., mask == 0] != x[..., mask == 0]).all()


@pytest.mark.parametrize("swap", [False, True])
def test_channel_coupling_by_hand(swap):
    x = randn(2, 4, 3, 3)
    shift, raw = randn(2, 2, 2, 3, 3, seed=1)
    coupling = ChannelCoupling(Fixed(shift, raw), swap, 0.7).double()
    y, log_det = coupling(x)
    log_scale = coupling.log_scale_factor.detach() * raw.tanh()
    kept = slice(0, 2)
    changed = slice(2, 4)
    if swap:
        kept, changed = changed, kept
    assert torch.equal(y[:, kept], x[:, kept])
    assert torch.equal(coupling.conditioner.input, x[:, kept])
    assert_close(y[:, changed], (x[:, changed] + shift) * log_scale.exp())
    assert_close(log_det, log_scale.sum((1, 2, 3)))
    assert_close(coupling.inverse(y)[0], x)


@pytest.mark.parametrize("coupling", ["masked", "channel"])
def test_the_norm_of_a_coupling_comes_after_its_affine_map(coupling):
    norm = CouplingBatchNorm(2)
    norm.running_mean = torch.tensor([1.0, 2.0])
    norm.running_var = torch.tensor([4.0, 9.0])
    shift, raw, x = randn(3, 2, 2, 2, 2).float()
    if coupling == "channel":
        flow = ChannelCoupling(Fixed(shift, raw), False, 1.0, norm)
        kept = randn(2, 2, 2, 2, seed=5).float()
        y = flow.eval()(torch.cat([kept, x], 1))[0][:, 2:]
    else:
        y = MaskedCoupling(torch.zeros(1, 2, 2), Fixed(shift, raw), 1.0, norm).eval()(x)[0]
    affine = (x + shift) * raw.tanh().exp()
    mean = norm.running_mean[:, None, None]
    std = (norm.running_var + EPS).sqrt()[:, None, None]
    assert_close(y, (affine - mean) / std, 1e-5)


def test_mlp_conditioner_is_two_separate_networks():
    net = MLPConditioner(2, 8)
    shift, log_scale = net(randn(3, 2).float())
    assert shift.shape == log_scale.shape == (3, 2)
    shift.sum().backward()
    assert all(parameter.grad is None for parameter in net.log_scale.parameters())
    assert all(parameter.grad is not None for parameter in net.shift.parameters())


def test_compose_applies_in_order_and_inverts_in_reverse_order():
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layers = [Logit(), OrderedSqueeze(3), Squeeze()]
    z, log_det = Compose(layers)(x)
    y, expected_log_det = layers[0](x)
    expected = layers[2](layers[1](y)[0])[0]
    assert torch.equal(z, expected)
    assert_close(log_det, expected_log_det)
    assert_close(Compose(layers).inverse(z)[0], x)


# Activation normalisation


@torch.no_grad()
def initialised(norm, x):
    """The layer after `initialize`."""
    norm.initialize(x)
    return norm


def test_actnorm_by_hand():
    norm = perturb(ActNorm(3)).double()
    x = randn(2, 3, 4, 6)
    y, log_det = norm(x)
    for c in range(3):
        bias = norm.bias[c].item()
        scale = math.exp(3 * norm.log_scale[c].item())
        assert_close(y[:, c].detach(), (x[:, c] + bias) * scale)
    assert_close(log_det.detach(), [4 * 6 * 3 * norm.log_scale.sum().item()] * 2)
    assert_close(norm.inverse(y)[0], x)


def test_actnorm_is_the_identity_until_it_is_initialised():
    norm = ActNorm(3).double()
    x = randn(2, 3, 4, 6)
    assert uninitialized(norm)
    assert torch.equal(norm(x)[0], x)
    assert torch.equal(norm(x)[1], torch.zeros(2, dtype=torch.float64))


def test_actnorm_starts_with_mean_0_and_variance_1():
    x = shifted() * torch.tensor([1.0, 1e-3, 100.0])[:, None, None]
    norm = ActNorm(3).double()
    with torch.no_grad():
        returned = norm.initialize(x)
    y, _ = norm(x)
    assert not uninitialized(norm)
    assert torch.equal(returned, y)
    std = x.var((0, 2, 3), correction=0).sqrt()
    assert_close(y.mean((0, 2, 3)), torch.zeros(3), 1e-12)
    assert_close(y.var((0, 2, 3), correction=0).sqrt(), std / (std + 1e-6), 1e-12)
    assert_close(norm.bias[:, 0, 0], -x.mean((0, 2, 3)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x[:, 1].fill_(5.1), "1 of 3 channels have the same value in all of the first"),
        (lambda x: x[0, 2].fill_(torch.nan), "1 of 3 channels are not finite in the first batch"),
        (lambda x: x[0, :2].fill_(torch.inf), "2 of 3 channels are not finite in the first batch"),
        (lambda x: x.resize_(31, 3, 1, 1), "31 data of 1x1 pixels .* give 32 data or more"),
        (lambda x: x.resize_(1, 3, 2, 3), "1 data of 2x3 pixels .* give 32 data or more"),
        (lambda x: x.resize_(0, 3, 4, 4), "0 data of 4x4 pixels .* give 32 data or more"),
    ],
)
def test_actnorm_refuses_a_batch_that_does_not_determine_it(spoil, message):
    """A constant channel would get a scale of a million, and two values a random one."""
    x = shifted().float()
    spoil(x)
    norm = ActNorm(3)
    with pytest.raises(ValueError, match=message) as error:
        norm.initialize(x)
    assert "\n" not in str(error.value)
    assert uninitialized(norm)
    assert torch.equal(norm.bias, torch.zeros(3, 1, 1))
    assert torch.equal(norm.log_scale, torch.zeros(3, 1, 1))


def test_actnorm_is_initialised_while_gradients_are_enabled():
    norm = ActNorm(3).double()
    x = shifted().requires_grad_()
    y = norm.initialize(x)
    assert not y.requires_grad
    assert_close(y.mean((0, 2, 3)), torch.zeros(3))
    assert_close(norm(x)[0].detach(), y)


def test_a_batch_norm_refuses_to_be_trained_with_an_empty_batch():
    """Its running averages would be NaN from then on."""
    norm = CouplingBatchNorm(2)
    with pytest.raises(ValueError, match="an empty batch has no mean: a batch norm cannot"):
        norm(torch.zeros(0, 2, 4, 4))
    assert norm.running_mean.isfinite().all()
    assert norm.running_var.isfinite().all()


def test_actnorm_is_initialised_once():
    norm = initialised(ActNorm(3).double(), shifted())
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    y = initialised(norm, 5 + 7 * shifted(seed=1)).normalize(shifted())
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert_close(y.mean((0, 2, 3)), torch.zeros(3))


# Convolutions that know the border, and layers that start at 0


def padded(x):
    """x with zeros around it, and one more channel: 1 on the padding, 0 inside."""
    x = nn.functional.pad(x, (1, 1, 1, 1))
    border = torch.ones_like(x[:, :1])
    border[..., 1:-1, 1:-1] = 0
    return torch.cat([x, border], 1)


def with_edge(conv):
    """The weight of a convolution of `padded` images, (C_out, C_in or C_in + 1, 3, 3)."""
    if conv.edge is None:
        return conv.weight
    return torch.cat([conv.weight, conv.edge.weight], 1)


@pytest.mark.parametrize("size", [(4, 6), (1, 1), (1, 3), (2, 2), (7, 5)])
def test_an_edge_convolution_is_that_of_an_appended_border_channel(size):
    conv = perturb(EdgeConv2d(2, 3, True)).double()
    x = randn(2, 2, *size)
    weight = torch.cat([conv.weight, conv.edge.weight], 1)
    assert_close(conv(x), nn.functional.conv2d(padded(x), weight))
    assert conv.bias is None


def test_edge_weights_touch_the_border_only():
    with_edges = EdgeConv2d(2, 3, True).double()
    without = EdgeConv2d(2, 3, False).double()
    without.weight = with_edges.weight
    assert without.edge is None
    x = randn(2, 2, 8, 9)
    difference = with_edges(x) - without(x)
    assert torch.equal(difference[..., 1:-1, 1:-1], torch.zeros(2, 3, 6, 7, dtype=torch.float64))
    border = torch.ones(8, 9, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert difference[..., border].abs().min() > 0
    assert_close(without(x), nn.functional.conv2d(x, without.weight, padding=1))


def test_hidden_convolutions_start_as_n_0_0_05():
    torch.manual_seed(0)
    net = GlowConditioner(20, 8, 40, edges=True)
    for weight in (net.conv_in.weight, net.conv_in.edge.weight, net.conv_mid.weight):
        assert abs(weight.std() / 0.05 - 1) < 0.1
        assert abs(weight.mean()) < 0.01
    assert all((parameter == 0).all() for parameter in net.conv_out.parameters())
    assert net.conv_mid.bias is None
    assert net.conv_mid.kernel_size == (1, 1)


@pytest.mark.parametrize("edges", [True, False])
def test_zero_convolution(edges):
    conv = ZeroConv2d(2, 3, edges).double()
    x = randn(2, 2, 4, 6)
    assert torch.equal(conv(x), torch.zeros(2, 3, 4, 6, dtype=torch.float64))
    perturb(conv)
    weight = with_edge(conv)
    y = nn.functional.conv2d(padded(x)[:, : weight.shape[1]], weight)
    for c in range(3):
        expected = (y[:, c] + conv.shift[c]) * math.exp(3 * conv.log_scale[c].item())
        assert_close(conv(x)[:, c], expected)


def test_zero_linear():
    linear = ZeroLinear(3, 2).double()
    x = randn(4, 3)
    assert torch.equal(linear(x), torch.zeros(4, 2, dtype=torch.float64))
    perturb(linear)
    assert_close(linear(x), (x @ linear.weight.T + linear.bias) * (3 * linear.log_scale).exp())


@pytest.mark.parametrize("edges", [True, False])
def test_glow_conditioner_by_hand(edges):
    net = perturb(GlowConditioner(2, 6, 5, edges)).double()
    x = randn(3, 2, 4, 6)

    def norm(h, layer):
        return (h + layer.bias) * (3 * layer.log_scale).exp()

    def conv(h, layer):
        weight = with_edge(layer)
        return nn.functional.conv2d(padded(h)[:, : weight.shape[1]], weight)

    h = norm(conv(x, net.conv_in), net.norm_in).relu()
    h = torch.einsum("ij,bjhw->bihw", net.conv_mid.weight[..., 0, 0], h)
    h = norm(h, net.norm_mid).relu()
    expected = conv(h, net.conv_out) + net.conv_out.shift
    assert_close(net(x), expected * (3 * net.conv_out.log_scale).exp())


# Permutations of channels


def test_reverse_is_its_own_inverse():
    x = randn(2, 6, 2, 3)
    reverse = ChannelPermutation(torch.arange(6).flip(0))
    y, log_det = reverse(x)
    assert torch.equal(y, x.flip(1))
    assert torch.equal(reverse(y)[0], x)
    assert torch.equal(reverse.inverse(x)[0], y)
    assert torch.equal(log_det, torch.zeros(2, dtype=torch.float64))


def test_channel_permutation_by_hand():
    order = torch.tensor([2, 0, 3, 1])
    x = randn(2, 4, 2, 3)
    shuffle = ChannelPermutation(order)
    y, _ = shuffle(x)
    assert all(torch.equal(y[:, c], x[:, order[c]]) for c in range(4))
    assert torch.equal(shuffle.inverse(y)[0], x)
    assert torch.equal(shuffle.state_dict()["order"], order)


def matrix(layer):
    (weight,), (log_det,) = matrices([layer])
    return weight, log_det


@pytest.mark.parametrize("n", [1, 5, 48])
def test_w_starts_orthogonal(n):
    torch.manual_seed(0)
    weight = rotation(n)
    assert_close(weight @ weight.T, torch.eye(n), 1e-12)
    for layer in (InvertibleConv1x1(n), InvertibleConv1x1LU(n)):
        weight, log_det = matrix(layer)
        assert weight.dtype == log_det.dtype == torch.float64
        assert_close((weight @ weight.T).detach(), torch.eye(n), 1e-5)  # of float32 parameters
        assert_close(log_det.detach(), 0.0, 1e-5)


@pytest.mark.parametrize("kind", [InvertibleConv1x1, InvertibleConv1x1LU])
def test_w_multiplies_every_pixel(kind):
    torch.manual_seed(0)
    layer = perturb(kind(4)).double()
    x = randn(2, 4, 3, 5)
    weight, _ = matrix(layer)
    y, log_det = layer(x)
    for row in range(3):
        for column in range(5):
            assert_close(y[:, :, row, column], x[:, :, row, column] @ weight.T)
    sign, log_abs_det = torch.linalg.slogdet(weight)
    assert abs(log_abs_det) > 0.05
    assert_close(log_det, (15 * log_abs_det).expand(2))
    assert_close(layer.inverse(y)[0], x)
    assert sign != 0


def test_w_and_its_triangles_are_the_same_map():
    torch.manual_seed(0)
    lu = perturb(InvertibleConv1x1LU(6)).double()
    plain = InvertibleConv1x1(6).double()
    x = randn(2, 6, 3, 5)
    plain.weight.data = matrix(lu)[0].detach()
    for one, other in ((lu(x), plain(x)), (lu.inverse(x), plain.inverse(x))):
        assert_close(one[0], other[0])
        assert_close(one[1], other[1])
    assert_close(lu.log_scale.sum(), torch.linalg.slogdet(plain.weight).logabsdet)


def test_the_triangles_are_those_of_the_rotation():
    """Signs and P are buffers, and the unused triangles have no effect."""
    torch.manual_seed(0)
    layer = InvertibleConv1x1LU(6)
    assert {name for name, _ in layer.named_parameters()} == {"lower", "upper", "log_scale"}
    assert {name for name, _ in layer.named_buffers()} == {"permutation", "sign"}
    assert layer.sign.abs().tolist() == [1.0] * 6
    assert (layer.permutation.sum(0) == 1).all()
    assert (layer.permutation.sum(1) == 1).all()
    before = matrix(layer)[0].detach()
    with torch.no_grad():
        layer.lower += torch.ones(6, 6).triu()
        layer.upper += torch.ones(6, 6).tril()
    assert torch.equal(matrix(layer)[0], before)


# Glow's couplings and learned priors


class Answer(nn.Module):
    """A conditioner with one fixed output, which remembers its input."""

    def __init__(self, h):
        super().__init__()
        self.h = h

    def forward(self, x, context=None):
        self.input = x
        return self.h


def test_additive_coupling_by_hand():
    x = randn(2, 4, 3, 3)
    h = randn(2, 2, 3, 3, seed=1)
    coupling = AdditiveCoupling(Answer(h))
    y, log_det = coupling(x)
    assert torch.equal(coupling.conditioner.input, x[:, :2])
    assert torch.equal(y, torch.cat([x[:, :2], x[:, 2:] + h], 1))
    assert torch.equal(log_det, torch.zeros(2, dtype=torch.float64))
    assert_close(coupling.inverse(y)[0], x)


def test_sigmoid_coupling_by_hand():
    x = randn(2, 4, 3, 3)
    h = 3 * randn(2, 4, 3, 3, seed=1)
    coupling = SigmoidCoupling(Answer(h))
    y, log_det = coupling(x)
    scale = 1 / (1 + (-h[:, 2:] - 2).exp())
    assert torch.equal(coupling.conditioner.input, x[:, :2])
    assert torch.equal(y[:, :2], x[:, :2])
    assert_close(y[:, 2:], (x[:, 2:] + h[:, :2]) * scale)
    assert_close(log_det, scale.log().sum((1, 2, 3)))
    assert_close(coupling.inverse(y)[0], x)


def log_normal(z, mean, log_std):
    return torch.distributions.Normal(mean, log_std.exp()).log_prob(z).sum((1, 2, 3))


def test_split_prior_is_a_normal_given_the_kept_half():
    prior = perturb(SplitPrior(6, edges=True), 0.1).double()
    x = randn(3, 6, 4, 5)
    y, log_det = prior(x)
    mean, log_std = prior.net(x[:, :3]).chunk(2, 1)
    kept, eps = y.chunk(2, 1)
    assert torch.equal(kept, x[:, :3])
    assert_close(eps, (x[:, 3:] - mean) / log_std.exp())
    standard = log_normal(eps, torch.zeros(()), torch.zeros(()))
    assert_close(standard + log_det, log_normal(x[:, 3:], mean, log_std), 1e-9)
    hot = prior.inverse(torch.cat([kept, 0.7 * eps], 1))[0][:, 3:]
    assert_close(hot, mean + 0.7 * (x[:, 3:] - mean))


@pytest.mark.parametrize("edges", [True, False])
@pytest.mark.parametrize("n_classes", [None, 3])
def test_top_prior_is_a_normal_of_a_zero_convolution_of_zeros(edges, n_classes):
    """It is constant per channel inside of the border; a class adds a row of a `ZeroLinear`."""
    prior = perturb(TopPrior(2, edges, n_classes), 0.2).double()
    x = randn(3, 2, 4, 5)
    y = None
    if n_classes is not None:
        y = torch.tensor([2, 0, 2])
    conv = ZeroConv2d(4, 4, edges).double()
    conv.shift = prior.shift
    conv.log_scale = prior.log_scale
    conv.edge = prior.edge
    h = conv(torch.zeros(3, 4, 4, 5, dtype=torch.float64))
    if n_classes is not None:
        h = h + prior.by_class(torch.eye(3, dtype=torch.float64)[y])[:, :, None, None]
    mean, log_std = h.chunk(2, 1)
    assert (mean.std((2, 3)).max() > 1e-2) == edges
    assert_close(mean[:, :, 1:-1, 1:-1].std((2, 3)), torch.zeros(3, 2))
    eps, log_det = prior(x, y)
    standard = log_normal(eps, torch.zeros(()), torch.zeros(()))
    assert_close(standard + log_det, log_normal(x, mean, log_std), 1e-9)
    assert_close(prior.inverse(0.7 * eps, y)[0], mean + 0.7 * (x - mean))


def test_a_prior_of_classes_without_a_class_is_one_line():
    with pytest.raises(ValueError, match=r"^the prior depends on the class: give it as context"):
        TopPrior(4, False, n_classes=3)(randn(2, 4, 3, 3))


@pytest.mark.parametrize(
    "prior",
    [SplitPrior(4, True), TopPrior(4, True), TopPrior(4, False, 3)],
    ids=["split", "top", "class"],
)
def test_a_learned_prior_starts_as_a_standard_normal(prior):
    x = randn(2, 4, 3, 3)
    y = torch.tensor([0, 2])
    eps, log_det = prior.double()(x, y)
    assert torch.equal(eps, x)
    assert torch.equal(log_det, torch.zeros(2, dtype=torch.float64))


def test_shift():
    x = randn(2, 3, 4, 4)
    assert torch.equal(Shift(-0.5)(x)[0], x - 0.5)
    assert_close(Shift(-0.5).inverse(x)[0], x + 0.5)
