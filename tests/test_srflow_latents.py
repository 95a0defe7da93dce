"""What is done to SRFlow's latents, each by its defining property; the command of the pictures."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from released_files import released
from scipy import stats

from datamodules.bicubic import downscale
from flows.srflow import SRFlow
from flows.srflow.latents import (
    GROUPS,
    decode,
    drawn_like,
    encode,
    harmonized,
    moments,
    normalized,
    replaced,
    resampled,
    restored,
    styled,
    transferred,
)
from reproduce import import_srflow, latent_space
from reproduce.model import TrainedModel
from reproduce.released_srflow import released_model

TEMPERATURE = 0.7
SIZE = (16, 24)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def flow():
    """A tiny flow of random weights, in float64."""
    torch.manual_seed(0)
    flow = SRFlow(
        depth=1,
        transition_depth=1,
        hidden_channels=4,
        encoder_blocks=2,
        encoder_channels=4,
        encoder_growth=2,
        stacked=(0, 1),
    )
    flow.double().eval().requires_grad_(False)
    for parameter in flow.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return flow


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, *SIZE, generator=seeded(1), dtype=torch.float64)


def reduce(images):
    """The means of 4x4 pixels."""
    return torch.nn.functional.avg_pool2d(images, 4)


def region(rows=slice(0, 8), columns=slice(8, 16)):
    mask = torch.zeros(1, 1, *SIZE, dtype=torch.bool)
    mask[..., rows, columns] = True
    return mask


def random_latents(n=1, scale=1.0, seed=0):
    generator = seeded(seed)
    shapes = ((6, 8, 12), (96, 2, 3))
    return tuple(
        scale * torch.randn(n, *shape, generator=generator, dtype=torch.float64) for shape in shapes
    )


def close(ours, expected, atol=1e-10):
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


# ---------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("groups", GROUPS)
def test_each_group_gets_the_moments_of_drawn_latents_and_keeps_its_pattern(groups):
    z = tuple(3 + 5 * level for level in random_latents(n=2))
    result = normalized(z, groups, TEMPERATURE, seeded(7))
    drawn = drawn_like(z, TEMPERATURE, seeded(7))
    levels = zip(z, result, moments(z, groups), moments(result, groups), strict=True)
    for expected, (mean, std) in zip(moments(drawn, groups), moments(result, groups), strict=True):
        close((mean, std), expected)
    for before, after, own, new in levels:
        close([(after - new[0]) / new[1]], [(before - own[0]) / own[1]])


@pytest.mark.parametrize(
    ("groups", "shape"),
    [("global", (1, 1, 1)), ("local", (1, 8, 12)), ("spatial", (6, 1, 1))],
)
def test_an_affine_change_of_a_group_is_undone(groups, shape):
    """Any gain and offset of a group is lost: this is what takes a degradation away."""
    first, last = random_latents()
    gain = 0.5 + torch.rand(shape, generator=seeded(2), dtype=torch.float64)
    offset = torch.randn(shape, generator=seeded(3), dtype=torch.float64)
    changed = (gain * first + offset, last)
    if groups == "global":
        changed = (gain * first + offset, gain * last + offset)
    expected = normalized((first, last), groups, TEMPERATURE, seeded(4))
    close(normalized(changed, groups, TEMPERATURE, seeded(4)), expected)


def test_means_and_variances_are_distributed_as_in_the_paper():
    """With tau = temperature^2, by tests of Kolmogorov and Smirnov over 960 groups of 96."""
    z = (torch.zeros(1, 6, 8, 8), 4 + 9 * torch.rand(40, 96, 4, 6, generator=seeded(5)))
    z = (z[0].expand(40, -1, -1, -1), z[1])
    [_, (mean, std)] = moments(normalized(z, "local", TEMPERATURE, seeded(6)), "local")
    n = 96
    tau = TEMPERATURE**2
    of_mean = stats.norm(0, np.sqrt(tau / n))
    of_variance = stats.gamma((n - 1) / 2, scale=2 * tau / (n - 1))
    assert stats.kstest(mean.flatten().numpy(), of_mean.cdf).pvalue > 0.01
    assert stats.kstest(std.square().flatten().numpy(), of_variance.cdf).pvalue > 0.01
    # A temperature that is taken for the variance is told apart.
    wrong = stats.gamma((n - 1) / 2, scale=2 * TEMPERATURE / (n - 1))
    assert stats.kstest(std.square().flatten().numpy(), wrong.cdf).pvalue < 1e-9


@pytest.mark.parametrize("groups", GROUPS)
def test_latents_of_the_model_stay_latents_of_the_model(groups):
    z = random_latents(n=10, scale=TEMPERATURE, seed=8)
    for level in normalized(z, groups, TEMPERATURE, seeded(9)):
        normal = stats.norm(0, TEMPERATURE)
        assert stats.kstest(level.flatten().numpy(), normal.cdf).pvalue > 0.01


def test_equal_or_single_latents_have_a_mean_and_no_spread():
    z = (torch.full((1, 2, 3, 3), 5.0), torch.full((1, 4, 1, 1), 5.0))
    drawn = drawn_like(z, 1.0, seeded())
    first, last = normalized(z, "spatial", 1.0, seeded())
    close([first], [drawn[0].mean((2, 3), keepdim=True).expand_as(first)], atol=1e-6)
    torch.testing.assert_close(last, drawn[1])


def test_arguments_out_of_range_are_one_line():
    z = random_latents()
    with pytest.raises(ValueError, match="groups=all are not known: give one of global, local"):
        normalized(z, "all", 1.0)
    with pytest.raises(ValueError, match="temperature=-1 is out of range"):
        normalized(z, "local", -1)
    for shape in ((16, 24), (3, 1, 16, 24), (1, 3, 16, 24), (1, 1, 17, 24)):
        with pytest.raises(ValueError, match="give \\(1, 1, H, W\\), or one for each of 1 images"):
            replaced(z, z, torch.ones(shape, dtype=torch.bool))


# ---------------------------------------------------------------------- images


def test_an_image_is_encoded_given_any_low_resolution_image(flow, images):
    other = reduce(images.flip(0))
    for low_res in (reduce(images), other, flow.encode_context(other)):
        close([decode(flow, encode(flow, images, low_res), low_res)], [images])
    own = encode(flow, images, reduce(images))
    levels = zip(own, encode(flow, images, other), strict=True)
    assert all((a - b).abs().max() > 1e-3 for a, b in levels)


def test_only_latents_of_the_region_are_redrawn(flow, images):
    low_res = reduce(images)
    result = resampled(flow, images, low_res, region(), TEMPERATURE, seeded(3))
    before = encode(flow, images, low_res)
    after = encode(flow, result, low_res)
    drawn = drawn_like(before, TEMPERATURE, seeded(3))
    inside = [(slice(0, 4), slice(4, 8)), (slice(0, 1), slice(1, 2))]  # of the two levels
    for old, new, fresh, (rows, columns) in zip(before, after, drawn, inside, strict=True):
        is_inside = torch.zeros(old.shape[2:], dtype=torch.bool)
        is_inside[rows, columns] = True
        close([new[..., is_inside]], [fresh[..., is_inside]])
        close([new[..., ~is_inside]], [old[..., ~is_inside]])


def test_redrawing_nothing_is_the_image_and_redrawing_all_is_a_sample(flow, images):
    low_res = reduce(images)
    nothing = torch.zeros(1, 1, *SIZE, dtype=torch.bool)
    close([resampled(flow, images, low_res, nothing, TEMPERATURE)], [images])
    everything = resampled(flow, images, low_res, ~nothing, TEMPERATURE, seeded(5))
    sample = flow.sample(1, TEMPERATURE, low_res, generator=seeded(5))[0]
    close([everything], [sample])


def test_a_region_covers_every_latent_that_it_touches(flow):
    z = random_latents()
    mask = torch.zeros(1, 1, *SIZE, dtype=torch.bool)
    mask[..., 7, 8] = True  # one pixel
    ones = tuple(torch.ones_like(level) for level in z)
    changed = replaced(tuple(0 * level for level in z), ones, mask)
    assert [level[0, 0].nonzero().tolist() for level in changed] == [[[3, 4]], [[0, 1]]]


def test_content_is_transferred_where_it_was_pasted_alone(flow, images):
    edited = torch.where(region(), images.flip(0), images)
    low_res = reduce(images)
    result = transferred(flow, edited, low_res, region(), TEMPERATURE, seeded(2))
    before = encode(flow, edited, low_res)
    normal = normalized(before, "local", TEMPERATURE, seeded(2))
    close(encode(flow, result, low_res), replaced(before, normal, region()))
    nothing = torch.zeros(1, 1, *SIZE, dtype=torch.bool)
    close([transferred(flow, edited, low_res, nothing, TEMPERATURE)], [edited])


def test_harmonisation_agrees_with_the_composite(flow, images):
    composite = torch.where(region(), images.flip(0), images)
    result = harmonized(flow, composite, reduce, region(), TEMPERATURE, seeded(2))
    low_res = reduce(composite)
    expected = transferred(flow, composite, low_res, region(), TEMPERATURE, seeded(2))
    assert torch.equal(result, expected)
    other = transferred(flow, composite, reduce(images), region(), TEMPERATURE, seeded(2))
    assert (result - other).abs().max() > 1e-3


def test_a_restored_image_has_normal_latents_given_the_degraded_low_resolution_image(flow, images):
    noise = torch.randn(images.shape, generator=seeded(4), dtype=torch.float64)
    degraded = images + 0.1 * noise
    low_res = reduce(degraded)
    generator = seeded(6)
    result = restored(flow, degraded, reduce, TEMPERATURE, generator)
    generator = seeded(6)
    z = encode(flow, degraded, low_res)
    drawn_like(z, TEMPERATURE, generator)  # of the spatial normalisation, which comes first
    expected = moments(drawn_like(z, TEMPERATURE, generator), "local")
    for one, other in zip(moments(encode(flow, result, low_res), "local"), expected, strict=True):
        close(one, other)


def test_at_temperature_0_restoration_is_the_most_likely_image(flow, images):
    expected = flow.sample(1, 0.0, reduce(images))[0]
    close([restored(flow, images, reduce, 0.0)], [expected])


def test_style_is_the_latents_of_another_image(flow, images):
    source = images.flip(0)
    result = styled(flow, source, reduce(source), reduce(images))
    close(encode(flow, result, reduce(images)), encode(flow, source, reduce(source)))
    close([styled(flow, images, reduce(images), reduce(images))], [images])


# ---------------------------------------------------------------------- the command

PICTURES = ["harmonization", "resampling", "restoration", "style", "transfer"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny trained model."""
    folder = tmp_path_factory.mktemp("model")
    path = folder / "tiny.pth"
    weights = released()
    torch.save(weights, path)
    stored = import_srflow.stored_of(path, weights, released_model(weights, path, (0, 2)))
    TrainedModel(stored).save(folder / "model.safetensors")
    return folder


@pytest.fixture
def photo(tmp_path):
    """A file with an image of 40x30 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def mistake(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        latent_space.main([str(word) for word in words])
    assert isinstance(stop.value.code, str), "exit code 0 for a mistake"
    assert "\n" not in stop.value.code
    assert "Traceback" not in capsys.readouterr().err
    return stop.value.code.removeprefix("error: ")


def lab_of(model, **settings):
    options = OmegaConf.create(latent_space.DEFAULTS | {"device": "cpu", "side": 32} | settings)
    return latent_space.lab_of(str(model), options)


def test_the_command_draws_every_picture_the_same_for_a_seed(model, photo, tmp_path, capsys):
    words = [str(model), f"images={photo}", "side=24", "temperature=0.1"]
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        latent_space.main([*words, f"seed={seed}", f"out={tmp_path / name}"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:5]] == [
        str(tmp_path / "first" / f"{kind}.png") for kind in latent_space.PICTURES
    ]
    assert sorted(path.stem for path in (tmp_path / "first").iterdir()) == PICTURES

    def contents(name):
        return [(tmp_path / name / f"{kind}.png").read_bytes() for kind in PICTURES]

    assert contents("again") == contents("first")
    differ = [one != other for one, other in zip(contents("other"), contents("first"), strict=True)]
    assert differ == [True, True, True, False, True]  # the style is not drawn at random


def test_the_rows_are_what_their_labels_say(model):
    lab = lab_of(model, n=3, noise=10.0, temperature=0.1)
    rows, labels, caption = latent_space.restoration(lab)
    assert labels == ["image", "noisy", "bicubic", "global", "spatial", "local", "restored"]
    noise = 255 * (rows[1] - rows[0])
    assert 8 < noise.std() < 10.5  # less than 10, since it is clipped
    assert f"noisy {lab.psnr(rows[1], rows[0]):.2f}" in caption
    rows, labels, caption = latent_space.transfer(lab)
    image, following, pasted, result = rows
    assert torch.equal(following, image.roll(-1, 0))
    assert torch.equal(pasted[..., 8:24, 8:24], following[..., 8:24, 8:24])
    assert torch.equal(pasted[..., :8, :], image[..., :8, :])
    expected = transferred(lab.flow, pasted, lab.reduce(image), lab.mask, 0.1, lab.generator())
    assert torch.equal(result, expected)
    low_res = downscale((255 * image).round().to(torch.uint8), 4)
    assert torch.equal(lab.reduce(image), low_res.float() / 255)


def test_the_figures_of_resampling_are_those_of_the_rows(model):
    lab = lab_of(model, n=2, region=[4, 8, 8, 12], temperature=0.1)
    rows, labels, caption = latent_space.resampling(lab)
    assert labels == ["image", "drawn 1", "drawn 2", "drawn 3", "4x spread"]
    frame = rows[0].sub(torch.tensor(latent_space.FRAME).view(1, 3, 1, 1)).abs().amax((0, 1)) == 0
    assert frame.sum() == 2 * 8 + 2 * 12 - 4
    assert frame[4:12, 8:20].sum() == frame.sum()
    spread = 255 * torch.stack(rows[1:4]).std(0).mean(1)
    inside = spread[:, 4:12, 8:20].mean().item()
    assert f": {inside:.2f} grey levels in the region" in caption
    total = spread.sum().item() - spread[:, 4:12, 8:20].sum().item()
    assert f"{total / (2 * (32 * 32 - 96)):.2f} outside" in caption


def test_values_that_are_not_finite_have_no_psnr(model):
    lab = lab_of(model, n=1)
    images = lab.images.clone()
    assert lab.psnr(images, images) == float("inf")
    images[0, 0, 0, 0] = torch.inf
    assert np.isnan(lab.psnr(images, images))
    assert np.isnan(lab.low_res_psnr(images, lab.images))


def test_mistakes_are_one_line(model, photo, tmp_path, capsys):
    assert "is a Glow: these pictures are of an SRFlow" in mistake(capsys, "glow_cifar10/cpu-seed0")
    for region in ("[0,0,200,8]", "[0,0,8]", "[-1,0,8,8]", "[0,0,0,8]", "middle"):
        line = mistake(capsys, model, f"region={region}", f"out={tmp_path / 'out'}")
        assert "give [ROW,COLUMN,HEIGHT,WIDTH] within 160x160" in line
    line = mistake(capsys, model, f"images={photo}", "side=6", f"out={tmp_path / 'out'}")
    assert "photo.png is 30x40 and side=6: this flow needs images of at least 8x8" in line
    assert "temperature=-1 is out of range" in mistake(capsys, model, "temperature=-1")
    assert "there is no folder" in mistake(capsys, model, f"images={tmp_path / 'none'}")
    assert not (tmp_path / "out").exists()
