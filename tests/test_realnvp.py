"""RealNVP against its paper and its authors' code: sizes, masks, channels, regularisation."""

import copy
import math

import numpy as np
import pytest
import torch
from cases import perturb

from flows.conditioners import WeightNormConv2d
from flows.coupling import ChannelCoupling, MaskedCoupling
from flows.normalization import CouplingBatchNorm
from flows.realnvp import RealNVP, RealNVP2d


def tiny(shape=(3, 8, 8), n_scales=2, hidden_channels=4, n_blocks=1, **kwargs):
    torch.manual_seed(0)
    return RealNVP(shape, n_scales, hidden_channels, n_blocks, **kwargs)


def couplings(scale, kind):
    return [layer for layer in scale.layers if isinstance(layer, kind)]


# The size of the model


def conditioner_size(channels, hidden, n_blocks, mask_channel):
    """The number of parameters of a conditioner.

    Batch norms have a bias alone. All convolutions are weight-normalised, and some have a
    magnitude for each output channel.
    """
    # Bias of the batch norm; 3x3 with bias.
    first = channels + 9 * (2 * channels + mask_channel) * hidden + hidden
    # Biases of two batch norms; two 3x3, the second with bias and magnitude.
    block = 2 * hidden + 2 * 9 * hidden**2 + 2 * hidden
    # 1x1 with bias and magnitude.
    skip = hidden**2 + 2 * hidden
    # Bias of the batch norm; 1x1 to shift and log-scale, with bias and magnitude.
    last = hidden + 2 * channels * hidden + 2 * 2 * channels
    return first + n_blocks * block + (n_blocks + 1) * skip + last


def model_size(channels, n_scales, hidden, n_blocks):
    """The number of parameters of a model; each coupling has a conditioner and a factor a."""
    total = 0
    for i in range(n_scales):
        c = channels * 2**i
        h = hidden * 2**i
        checkerboard = conditioner_size(c, h, n_blocks, 1) + 1
        channel = conditioner_size(2 * c, 2 * h, n_blocks, 0) + 1
        if i < n_scales - 1:
            total += 3 * checkerboard + 3 * channel
        else:
            total += 4 * checkerboard
    return total


def n_parameters(flow):
    return sum(parameter.numel() for parameter in flow.parameters())


def test_paper_size_has_19_609_545_parameters():
    with torch.device("meta"):
        assert n_parameters(RealNVP()) == model_size(3, 2, 64, 8) == 19_609_545


@pytest.mark.parametrize(("size", "n_scales", "n_blocks"), [(32, 4, 4), (64, 5, 2)])
def test_parameters_of_the_paper_s_other_models(size, n_scales, n_blocks):
    with torch.device("meta"):
        flow = RealNVP((3, size, size), n_scales, 32, n_blocks)
    assert n_parameters(flow) == model_size(3, n_scales, 32, n_blocks)


@pytest.mark.parametrize(
    ("size", "n_scales", "expected"),
    [
        (32, 2, [(6, 16, 16), (6, 16, 16)]),
        (32, 4, [(6, 16, 16), (12, 8, 8), (24, 4, 4), (24, 4, 4)]),
        (64, 5, [(6, 32, 32), (12, 16, 16), (24, 8, 8), (48, 4, 4), (48, 4, 4)]),
    ],
)
def test_latent_shapes(size, n_scales, expected):
    flow = tiny((3, size, size), n_scales, hidden_channels=2).eval()
    assert flow.latent_shapes() == tuple(expected)
    assert [tuple(z.shape[1:]) for z in flow(torch.rand(1, 3, size, size))[0]] == expected


def test_one_scale_is_four_checkerboards():
    flow = tiny(n_scales=1)
    assert flow.latent_shapes() == ((3, 8, 8),)
    assert n_parameters(flow) == model_size(3, 1, 4, 1)


# Its composition


def test_widths_double_per_scale_and_once_more_for_channel_couplings():
    with torch.device("meta"):
        flow = RealNVP(n_scales=3)

    def widths(kind):
        return [
            {c.conditioner.conv_in.out_channels for c in couplings(s, kind)} for s in flow.scales
        ]

    assert widths(MaskedCoupling) == [{64}, {128}, {256}]
    assert widths(ChannelCoupling) == [{128}, {256}, set()]


def test_order_of_masks_and_halves():
    first, last = tiny().scales
    assert [c.mask.parity for c in couplings(first, MaskedCoupling)] == [1, 0, 1]
    assert [c.swap for c in couplings(first, ChannelCoupling)] == [False, True, False]
    assert [c.mask.parity for c in couplings(last, MaskedCoupling)] == [1, 0, 1, 0]
    assert not couplings(last, ChannelCoupling)
    x = torch.zeros(1, 3, 4, 6)
    for coupling in [*couplings(first, MaskedCoupling), *couplings(last, MaskedCoupling)]:
        mask = coupling.mask(x)
        assert mask.shape == (4, 6)
        assert mask[0, 0] == coupling.mask.parity
        assert torch.equal(coupling.norm.mask(x), 1 - mask)
        assert torch.equal(coupling.conditioner.mask(x), mask)


def test_what_is_factored_out_is_one_colour_of_the_checkerboard():
    """Without its couplings a model only moves pixels.

    The first latent must then hold the top right and the bottom left ones.
    """
    flow = tiny(alpha=0.0).eval()
    for scale in flow.scales:
        scale.layers = torch.nn.ModuleList(m for m in scale.layers if not hasattr(m, "conditioner"))
    x = torch.rand(2, 3, 8, 8) * 0.9 + 0.05
    (z, rest), _ = flow(x)
    torch.testing.assert_close(z, torch.cat([x[..., 0::2, 1::2], x[..., 1::2, 0::2]], 1).logit())
    torch.testing.assert_close(rest, torch.cat([x[..., 0::2, 0::2], x[..., 1::2, 1::2]], 1).logit())


def test_initial_factors_are_0_for_checkerboards_and_1_for_channels():
    for scale in tiny(n_scales=3).scales:
        assert all(c.log_scale_factor == 0 for c in couplings(scale, MaskedCoupling))
        assert all(c.log_scale_factor == 1 for c in couplings(scale, ChannelCoupling))


def test_log_det_at_initialisation():
    """Running variances are 1 at first: each changed element is divided by sqrt(1 + 1e-4).

    Of D dimensions, three checkerboards change D/2 each and three channel couplings D/2 each. Then
    four checkerboards of the remaining D/2 change D/4 each. Together that is 4 D. Channel factors
    are set to 0, so that no s contributes.
    """
    flow = tiny().double().eval()
    for coupling in couplings(flow.scales[0], ChannelCoupling):
        coupling.log_scale_factor.data.fill_(0)
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    p = 0.05 + 0.9 * x
    logit = (0.9 / (p * (1 - p))).log().sum((1, 2, 3))
    torch.testing.assert_close(
        flow(x)[1], logit - 0.5 * math.log(1 + 1e-4) * 4 * 192, rtol=0, atol=1e-6
    )


def test_every_coupling_is_followed_by_batch_normalisation():
    flow = tiny()
    norms = [m.norm for m in flow.modules() if isinstance(m, MaskedCoupling | ChannelCoupling)]
    assert len(norms) == 10
    assert all(isinstance(norm, CouplingBatchNorm) for norm in norms)


# The L2 penalty


def test_l2_penalty_is_magnitudes_and_checkerboard_factors():
    flow = perturb(tiny())
    channel_couplings = ("scales.0.layers.4.", "scales.0.layers.5.", "scales.0.layers.6.")
    penalised = [
        parameter.detach().double()
        for name, parameter in flow.named_parameters()
        if name.endswith("magnitude")
        or (name.endswith("log_scale_factor") and not name.startswith(channel_couplings))
    ]
    # Each of 10 couplings has 4 magnitudes: in its block, two skips, the output. Of the couplings 7
    # are checkerboards.
    assert len(penalised) == 10 * 4 + 7
    by_hand = sum(parameter.square().sum().item() for parameter in penalised)
    assert flow.l2_penalty().item() == pytest.approx(by_hand, rel=1e-5)
    assert flow.l2_penalty().shape == ()


def test_l2_penalty_leaves_channel_factors_and_directions_alone():
    flow = perturb(tiny())
    flow.l2_penalty().backward()
    for coupling in (c for scale in flow.scales for c in couplings(scale, ChannelCoupling)):
        assert coupling.log_scale_factor.grad is None
    for coupling in (c for scale in flow.scales for c in couplings(scale, MaskedCoupling)):
        torch.testing.assert_close(
            coupling.log_scale_factor.grad, 2 * coupling.log_scale_factor.detach()
        )
    assert all(m.weight.grad is None for m in flow.modules() if isinstance(m, WeightNormConv2d))


# Errors


@pytest.mark.parametrize(
    ("shape", "n_scales", "most"),
    [
        ((3, 8, 8), 5, 4),
        ((3, 6, 8), 3, 2),
        ((3, 8, 6), 3, 2),
        ((1, 7, 7), 2, 1),
        ((1, 28, 28), 4, 3),
    ],
)
def test_a_size_that_cannot_be_halved_so_often_is_an_error(shape, n_scales, most):
    message = (
        rf"n_scales={n_scales}.*{shape[1]}x{shape[2]}.* give at most flow\.n_scales={most}, or"
    )
    with pytest.raises(ValueError, match=message):
        tiny(shape, n_scales)
    tiny(shape, most)


@pytest.mark.parametrize("size", ["n_scales", "hidden_channels", "n_blocks"])
def test_a_size_below_one_is_an_error(size):
    with pytest.raises(ValueError, match=size):
        tiny(**{size: 0})


@pytest.mark.parametrize("alpha", [-0.1, 0.5, 1.0])
def test_an_alpha_out_of_range_is_an_error(alpha):
    with pytest.raises(ValueError, match=f"alpha={alpha}"):
        tiny(alpha=alpha)


def test_points_of_three_coordinates_are_an_error():
    with pytest.raises(ValueError, match=r"\(3,\)"):
        RealNVP2d((3,))


# Two dimensions, where the whole density can be looked at


def points_model(dtype=torch.float64):
    torch.manual_seed(0)
    return perturb(RealNVP2d(n_couplings=6, hidden_channels=16), 0.1).to(dtype).eval()


def test_realnvp2d_changes_one_coordinate_after_the_other():
    flow = RealNVP2d()
    masks = [coupling.mask(None).tolist() for coupling in flow.couplings.layers]
    assert masks == [[0.0, 1.0], [1.0, 0.0]] * 3
    assert n_parameters(flow) == 6 * (2 * (2 * 256 + 256 + 256 * 256 + 256 + 256 * 2 + 2) + 1)


def test_a_density_in_two_dimensions_integrates_to_one():
    flow = points_model()
    n = 400
    side = torch.linspace(-12, 12, n + 1, dtype=torch.float64)[:-1]
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        density = flow.log_prob(grid).exp()
    assert float(density.sum() * (24 / n) ** 2) == pytest.approx(1, abs=0.01)
    normal = (-0.5 * grid.square().sum(1)).exp() / (2 * math.pi)
    # The flow is far from the identity.
    assert (density - normal).abs().sum() * (24 / n) ** 2 > 0.2


def test_the_notebook_s_log_det_is_wrong_and_ours_is_not():
    """A widely copied two-moons notebook sums s over the kept coordinate too."""
    flow = points_model()
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda point: flow(point[None])[0][0][0]))(x)
    true = torch.linalg.slogdet(jacobian).logabsdet
    notebook = torch.zeros(50, dtype=torch.float64)
    h = x
    for coupling in flow.couplings.layers:
        _, raw = coupling.conditioner(h * coupling.mask(h))
        notebook += (coupling.log_scale_factor * raw.tanh()).sum(1)
        h, _ = coupling(h)
    torch.testing.assert_close(flow(x)[1], true, rtol=0, atol=1e-6)
    assert (notebook - true).abs().mean() > 0.1


# After training


def smooth_images(n, shape, seed):
    """Random low frequencies, 8 bits, with uniform noise: float64 in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, shape[0], 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, shape[1:], mode="bicubic", align_corners=True)
    q = (255 * images.clamp(0, 1)).round().double()
    return (q + torch.rand(q.shape, generator=generator).double()) / 256


def train(flow, steps, batch_size, lr=1e-3):
    """Train as in the paper, in small: Adam, nats averaged over images, the L2 term.

    Returns the losses.
    """
    optimizer = torch.optim.Adam(flow.parameters(), lr=lr)
    losses = []
    flow.train()
    for step in range(steps):
        x = smooth_images(batch_size, flow.shape, seed=step).to(next(flow.parameters()))
        loss = -flow.log_prob(x).mean() + 5e-5 * flow.l2_penalty()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 100)
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_exactness_after_training(flow):
    """Check round trips after training: float32 to 1e-4 of the unit interval, float64 to 1e-9."""
    losses = train(flow, steps=50, batch_size=4)
    assert losses[-1] < losses[0] - 100  # nats
    x = smooth_images(4, flow.shape, seed=1000)
    for model, atol, log_det_atol in (
        (flow, 1e-4, 0.05),
        (copy.deepcopy(flow).double(), 1e-9, 1e-6),
    ):
        model.eval()
        data = x.to(next(model.parameters()))
        with torch.no_grad():
            latents, log_det = model(data)
            back, inverse_log_det = model.inverse(latents)
        torch.testing.assert_close(back, data, rtol=0, atol=atol)
        torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=log_det_atol)


def test_a_small_model_is_exact_after_50_steps():
    torch.manual_seed(0)
    check_exactness_after_training(RealNVP((3, 16, 16), 2, hidden_channels=8, n_blocks=2))


@pytest.mark.slow
def test_the_paper_s_model_is_exact_after_50_steps():
    torch.manual_seed(0)
    check_exactness_after_training(RealNVP())


GOLDEN = [49.029257949, 45.159734014, 41.639192052, 38.362768893, 35.408260786]


def test_golden_losses():
    """Five Adam steps of a small model.

    A change of these losses changes every number of the results page.
    """
    flow = tiny(n_blocks=2).double()
    x = torch.from_numpy(np.random.Generator(np.random.PCG64(0)).random((8, 3, 8, 8)))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    losses = []
    for _ in range(len(GOLDEN)):
        loss = -flow.log_prob(x).mean() + 5e-5 * flow.l2_penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(GOLDEN, rel=1e-4)
