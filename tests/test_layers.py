"""Each layer against its definition, spelled out by hand."""

import math

import pytest
import torch
from cases import perturb
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flows.base import Compose
from flows.conditioners import BiasOnlyBatchNorm2d, MLPConditioner, ResidualConditioner, WeightNormConv2d
from flows.coupling import ChannelCoupling, MaskedCoupling, checkerboard
from flows.elementwise import Logit
from flows.likelihood import bits_per_dim
from flows.normalization import CouplingBatchNorm
from flows.reshape import OrderedSqueeze, Squeeze, factor_in, factor_out

EPS = 1e-4


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


# bits per dimension


@pytest.mark.parametrize("n_bits", [5, 8])
def test_a_uniform_density_costs_exactly_n_bits(n_bits):
    assert torch.equal(bits_per_dim(torch.zeros(3), 3072, n_bits), torch.full((3,), float(n_bits)))


def test_bits_per_dim_is_linear_in_nats():
    n_dims = 12
    log_prob = torch.tensor([-1.0, 1.0, 2.5], dtype=torch.float64) * n_dims * math.log(2)
    assert_close(bits_per_dim(log_prob, n_dims, 8), torch.tensor([9.0, 7.0, 5.5]))
    # the long way round: nats of the discrete image, whose bins have the volume 256^-D
    assert_close(bits_per_dim(log_prob, n_dims, 8), (n_dims * math.log(256) - log_prob) / (n_dims * math.log(2)))


# Logit


@pytest.mark.parametrize("alpha", [0.05, 1e-6, 0.3])
def test_logit_log_det_is_the_sum_of_elementwise_derivatives(alpha):
    x = torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
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

even_images = st.tuples(*(st.integers(1, n) for n in (3, 4, 3, 3))).map(lambda s: randn(s[0], s[1], 2 * s[2], 2 * s[3]))


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
    """The weight that a convolution really applies, read off its response to one-hot images, without its bias."""
    k, c = conv.kernel_size[0], conv.in_channels
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
    assert_close(weight, conv.weight / conv.weight.flatten(1).norm(dim=1)[:, None, None, None], 1e-6)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_weight_norm_with_magnitude_has_it_as_its_norm(kernel_size):
    conv = WeightNormConv2d(5, 4, kernel_size, magnitude=True)
    assert_close(
        conv.magnitude.flatten(), torch.full((4,), math.sqrt(2 / 5) * math.sqrt(5 * kernel_size**2 / 12)), 1e-6
    )
    magnitude = torch.tensor([0.5, 1.0, 2.0, 3.0])
    conv.magnitude.data = magnitude[:, None, None, None]
    assert_close(effective_weight(conv).flatten(1).norm(dim=1), magnitude, 1e-5)


def test_weight_norm_initialisation():
    torch.manual_seed(0)
    conv = WeightNormConv2d(50, 40, 3)
    bound = math.sqrt(2 / 50)
    assert conv.weight.abs().max() <= bound
    assert abs(conv.weight.std() / (bound / math.sqrt(3)) - 1) < 0.02  # the standard deviation of U(-bound, bound)
    assert (conv.bias == 0).all()
    assert WeightNormConv2d(5, 4, 3, bias=False).bias is None


def test_bias_only_batch_norm_has_a_beta_and_no_gamma():
    norm = BiasOnlyBatchNorm2d(3).double()
    assert [name for name, _ in norm.named_parameters()] == ["bias"]
    perturb(norm)
    x = 2 + 3 * randn(4, 3, 5, 2)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    expected = (x - mean[:, None, None]) / (var + EPS).sqrt()[:, None, None] + norm.bias[:, None, None]
    assert_close(norm(x), expected)
    assert_close(norm.running_mean, 0.1 * mean)
    assert_close(norm.running_var, 0.9 + 0.1 * var * 40 / 39)  # torch's running variance is the unbiased one


@pytest.mark.parametrize("masked", [True, False])
def test_residual_conditioner_by_hand(masked):
    """The whole network written out; initial biases are 0, hence the perturbation."""
    mask = checkerboard(4, 4, 1).double() if masked else None
    net = perturb(ResidualConditioner(2, 5, 2, mask)).double()
    x = randn(3, 2, 4, 4) * (1 if mask is None else mask)

    def norm(h, layer):
        mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), correction=0, keepdim=True)
        return (h - mean) / (var + EPS).sqrt() + layer.bias[:, None, None]

    def conv(h, layer):
        weight = layer.weight / layer.weight.flatten(1).norm(dim=1)[:, None, None, None]
        weight = weight if layer.magnitude is None else weight * layer.magnitude
        return nn.functional.conv2d(h, weight, layer.bias, padding="same")

    h = norm(x, net.bn_in) * (2 if masked else 1)
    h = torch.cat([h, -h] + ([mask.expand(3, 1, 4, 4)] if masked else []), 1).relu()
    h = conv(h, net.conv_in)
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
    with_magnitude = {name for name, m in net.named_modules() if getattr(m, "magnitude", None) is not None}
    assert with_magnitude == {"blocks.0.layers.5", "blocks.1.layers.5", "skips.0", "skips.1", "skips.2", "conv_out"}


# Batch normalisation as a bijection


def moments(x, mask):
    """Mean and biased variance per channel, kept positions counted as zeros."""
    x, n = x * mask, x[:, 0].numel()
    mean = x.sum((0, 2, 3)) / n
    return mean, x.square().sum((0, 2, 3)) / n - mean.square()


def normalised(x, mean, var, mask):
    y = (x - mean[:, None, None]) / (var + EPS).sqrt()[:, None, None]
    return torch.where(mask.bool(), y, x)


MASKS = {"mask": checkerboard(4, 6, 0), "no-mask": None}


@pytest.fixture(params=MASKS)
def batch_norm(request):
    """The layer and its mask, ones where it has none."""
    mask = MASKS[request.param]
    return CouplingBatchNorm(3, mask).double(), torch.ones(4, 6).double() if mask is None else mask.double()


def shifted(seed=0):
    return 2 + 3 * randn(5, 3, 4, 6, seed=seed)


def test_coupling_batch_norm_normalises_by_the_batch_in_training(batch_norm):
    norm, mask = batch_norm
    x = shifted()
    y, log_det = norm(x)
    mean, var = moments(x, mask)
    assert_close(y, normalised(x, mean, var, mask))
    assert torch.equal(y * (1 - mask), x * (1 - mask))
    assert_close(log_det, (-0.5 * (var + EPS).log().sum() * mask.sum()).expand(5), 1e-8)  # the changed elements only


def test_coupling_batch_norm_without_mask_gives_zero_mean_and_unit_variance():
    y, _ = CouplingBatchNorm(3).double()(shifted())
    assert_close(y.mean((0, 2, 3)), torch.zeros(3))
    assert_close(y.var((0, 2, 3), correction=0), torch.ones(3), 1e-4)


def test_coupling_batch_norm_running_averages(batch_norm):
    norm, mask = batch_norm
    old_mean, old_var = norm.running_mean.copy_(randn(3)).clone(), norm.running_var.fill_(2.0).clone()
    norm(shifted())
    mean, var = moments(shifted(), mask)
    assert_close(norm.running_mean, 0.9 * old_mean + 0.1 * mean)
    assert_close(norm.running_var, 0.9 * old_var + 0.1 * var)


def test_coupling_batch_norm_uses_running_statistics_in_eval_and_leaves_them(batch_norm):
    norm, mask = batch_norm
    for seed in range(3):
        norm(shifted(seed))
    norm.eval()
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
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
    x, weight = shifted().requires_grad_(), randn(5, 3, 4, 6, seed=1)
    y, log_det = norm(x)
    (gradient,) = torch.autograd.grad((weight * y).sum() + log_det.sum(), x)
    mean, var = moments(x, mask)
    by_hand = (weight * normalised(x, mean, var, mask)).sum() - 5 * 0.5 * (var + EPS).log().sum() * mask.sum()
    assert_close(gradient, torch.autograd.grad(by_hand, x)[0], 1e-8)
    detached = (weight * normalised(x, mean.detach(), var.detach(), mask)).sum()
    assert (gradient - torch.autograd.grad(detached, x)[0]).abs().max() > 1e-2


def test_coupling_batch_norm_without_momentum_averages_all_batches(batch_norm):
    """How the running averages are estimated anew after training: torch's convention, the initial values forgotten."""
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
    """A conditioner that returns what it was given and remembers what it was shown."""

    def __init__(self, shift, raw):
        super().__init__()
        self.answer = shift, raw

    def forward(self, x):
        self.seen = x
        return self.answer


def test_masked_coupling_by_hand():
    mask, x, shift, raw = checkerboard(4, 6, 1).double(), randn(2, 3, 4, 6), *randn(2, 2, 3, 4, 6, seed=1)
    coupling = MaskedCoupling(mask[None], Fixed(shift, raw), 0.7).double()
    y, log_det = coupling(x)
    a = coupling.log_scale_factor.detach()
    assert_close(a, 0.7, 1e-7)
    expected = torch.where(mask.bool(), x, (x + shift) * (a * raw.tanh()).exp())
    assert_close(y, expected)
    assert_close(log_det, (a * raw.tanh())[..., mask == 0].sum((1, 2)))  # kept positions scale nothing
    assert torch.equal(coupling.conditioner.seen, x * mask)
    assert_close(coupling.inverse(y)[0], x)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_masked_coupling_keeps_masked_positions_bit_identical(train):
    mask = checkerboard(4, 6, 0)
    conditioner = ResidualConditioner(2, 4, 1, mask)
    coupling = perturb(MaskedCoupling(mask[None], conditioner, 0.0, CouplingBatchNorm(2, 1 - mask))).train(train)
    x = randn(3, 2, 4, 6).float()
    y, back = coupling(x)[0], coupling.inverse(x)[0]
    for changed in (y, back):
        assert torch.equal(changed[..., mask == 1], x[..., mask == 1])
        assert (changed[..., mask == 0] != x[..., mask == 0]).all()


@pytest.mark.parametrize("swap", [False, True])
def test_channel_coupling_by_hand(swap):
    x, shift, raw = randn(2, 4, 3, 3), *randn(2, 2, 2, 3, 3, seed=1)
    coupling = ChannelCoupling(Fixed(shift, raw), swap, 0.7).double()
    y, log_det = coupling(x)
    log_scale = coupling.log_scale_factor.detach() * raw.tanh()
    kept, changed = (slice(2, 4), slice(0, 2)) if swap else (slice(0, 2), slice(2, 4))
    assert torch.equal(y[:, kept], x[:, kept])
    assert torch.equal(coupling.conditioner.seen, x[:, kept])
    assert_close(y[:, changed], (x[:, changed] + shift) * log_scale.exp())
    assert_close(log_det, log_scale.sum((1, 2, 3)))
    assert_close(coupling.inverse(y)[0], x)


@pytest.mark.parametrize("coupling", ["masked", "channel"])
def test_the_norm_of_a_coupling_comes_after_its_affine_map(coupling):
    norm = CouplingBatchNorm(2)
    norm.running_mean, norm.running_var = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 9.0])
    shift, raw, x = randn(3, 2, 2, 2, 2).float()
    if coupling == "channel":
        flow, kept = ChannelCoupling(Fixed(shift, raw), False, 1.0, norm), randn(2, 2, 2, 2, seed=5).float()
        y = flow.eval()(torch.cat([kept, x], 1))[0][:, 2:]
    else:
        y = MaskedCoupling(torch.zeros(1, 2, 2), Fixed(shift, raw), 1.0, norm).eval()(x)[0]
    affine = (x + shift) * raw.tanh().exp()
    mean, std = torch.tensor([1.0, 2.0])[:, None, None], (torch.tensor([4.0, 9.0]) + EPS).sqrt()[:, None, None]
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
