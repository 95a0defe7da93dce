"""PSNR, SSIM, LR-PSNR and diversity, against cases by hand and independent implementations."""

import math

import numpy as np
import pytest
import torch
from skimage import color
from torch.nn import functional as F

from lightning_modules.quality.super_resolution import (
    as_uint8,
    diversity,
    low_res_psnr,
    luma,
    psnr_rgb,
    psnr_y,
    ssim_rgb_uniform,
    ssim_y_gaussian,
)


def pair(batch=2, height=24, width=29, seed=0):
    """Smooth random images, and the same with errors, (B, 3, H, W) uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear")
    noise = torch.randn(smooth.shape, generator=generator)
    return as_uint8(smooth + 0.05 * noise), as_uint8(smooth)


def windows(channel, weights, unbias):
    """SSIM by its definition, a window at a time, of two (H, W) arrays in `channel`."""
    side = len(weights)
    x, y = channel
    values = []
    for i in range(x.shape[0] - side + 1):
        for j in range(x.shape[1] - side + 1):
            a = x[i : i + side, j : j + side]
            b = y[i : i + side, j : j + side]
            mean_a = (weights * a).sum()
            mean_b = (weights * b).sum()
            var_a = (weights * (a - mean_a) ** 2).sum() * unbias
            var_b = (weights * (b - mean_b) ** 2).sum() * unbias
            both = (weights * (a - mean_a) * (b - mean_b)).sum() * unbias
            c1 = (0.01 * 255) ** 2
            c2 = (0.03 * 255) ** 2
            numerator = (2 * mean_a * mean_b + c1) * (2 * both + c2)
            values.append(numerator / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return np.mean(values)


def test_as_uint8_rounds_to_the_nearest_level_and_clips():
    values = torch.tensor([-3.0, 0.49 / 255, 0.51 / 255, 254.6 / 255, 7.0, math.inf])
    assert as_uint8(values).tolist() == [0, 0, 1, 255, 255, 255]
    levels = torch.arange(256)
    assert as_uint8(levels.float() / 255).equal(levels.to(torch.uint8))
    with pytest.raises(ValueError, match=r"not numbers \(NaN\)"):
        as_uint8(torch.tensor([math.nan]))
    with pytest.raises(ValueError, match=r"images of torch\.uint8 have no values from 0 to 1"):
        as_uint8(levels.to(torch.uint8))


def test_as_uint8_of_bfloat16_is_the_nearest_level_of_its_values():
    """The product with 255 is not rounded to bfloat16, whose steps are of one level there."""
    values = torch.linspace(0, 1, 999).bfloat16()
    expected = np.floor(values.double().numpy() * 255 + 0.5)
    assert as_uint8(values).tolist() == expected.tolist()


def test_psnr_of_a_case_by_hand():
    """Every level is off by 5 in one image, and one of 12 values by 6 in the other."""
    reference = torch.full((2, 3, 2, 2), 100, dtype=torch.uint8)
    image = reference.clone()
    image[0] += 5
    image[1, 2, 0, 1] -= 6
    expected = [20 * math.log10(255 / 5), 10 * math.log10(255**2 / 3)]
    assert psnr_rgb(image, reference).tolist() == pytest.approx(expected, abs=1e-12)
    assert psnr_rgb(image, reference).dtype == torch.float64
    assert psnr_rgb(reference, reference).tolist() == [math.inf, math.inf]


def test_psnr_of_the_luma_by_hand_and_its_border():
    """All channels off by d are a luma off by d * 219/255."""
    reference = torch.full((1, 3, 6, 6), 100, dtype=torch.uint8)
    image = reference + 10
    image[:, :, 0] = 255  # in the border
    expected = 20 * math.log10(255 / (10 * 219 / 255))
    assert psnr_y(image, reference, crop=1).item() == pytest.approx(expected, abs=1e-12)
    assert psnr_y(image, reference, crop=0).item() < expected - 10
    colours = torch.tensor([[0, 0, 0], [255, 255, 255], [255, 0, 0]], dtype=torch.uint8)
    assert luma(colours.view(3, 3, 1, 1)).flatten().tolist() == pytest.approx([16, 235, 81.481])


def test_the_luma_is_that_of_scikit_image():
    image, _ = pair()
    expected = color.rgb2ycbcr(image.movedim(1, -1).numpy())[..., 0]
    np.testing.assert_allclose(luma(image)[:, 0].numpy(), expected, atol=1e-9)


def test_ssim_of_rgb_is_its_definition():
    image, reference = pair(height=12, width=15)
    weights = np.full((7, 7), 1 / 49)
    expected = [
        np.mean([windows(channel, weights, 49 / 48) for channel in zip(a, b, strict=True)])
        for a, b in zip(image.double().numpy(), reference.double().numpy(), strict=True)
    ]
    values = ssim_rgb_uniform(image, reference)
    assert values.dtype == torch.float64
    assert values.tolist() == pytest.approx(expected, abs=1e-10)
    assert ssim_rgb_uniform(image, image).tolist() == [1, 1]


def test_ssim_of_the_luma_is_its_definition():
    image, reference = pair(height=18, width=20)
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    lumas = [luma(images)[:, 0, 2:-2, 2:-2].numpy() for images in (image, reference)]
    expected = [windows(channel, weights, 1) for channel in zip(*lumas, strict=True)]
    values = ssim_y_gaussian(image, reference, crop=2)
    assert values.tolist() == pytest.approx(expected, abs=1e-10)


def test_an_image_has_the_same_value_in_any_batch():
    image, reference = pair(batch=3)
    for function in (psnr_rgb, ssim_rgb_uniform):
        alone = [function(image[k : k + 1], reference[k : k + 1]).item() for k in range(3)]
        assert function(image, reference).tolist() == alone


def test_low_res_psnr_compares_at_the_low_resolution():
    image, _ = pair(height=8, width=8)
    low_res = image[:, :, ::2, ::2] ^ 1  # each value is off by one
    values = low_res_psnr(image, low_res, lambda images: images[:, :, ::2, ::2])
    assert values.tolist() == pytest.approx([20 * math.log10(255)] * 2, abs=1e-12)
    with pytest.raises(ValueError, match=r"2 x 8 x 8 cannot be compared with .* 2 x 4 x 4"):
        low_res_psnr(image, low_res, lambda images: images)


def test_diversity_by_hand():
    """Samples 10, 10 and 16 have the unbiased variance 12; equal ones none."""
    samples = torch.full((3, 2, 3, 4, 4), 10, dtype=torch.uint8)
    samples[2, 0] = 16
    assert diversity(samples).tolist() == pytest.approx([math.sqrt(12), 0], abs=1e-12)
    with pytest.raises(ValueError, match="at least 2 samples"):
        diversity(samples[:1])
    with pytest.raises(ValueError, match=r"uint8 \(n, B, 3, H, W\), but are torch.float32"):
        diversity(samples.float())


@pytest.mark.parametrize(
    ("function", "shape", "message"),
    [
        (psnr_rgb, (1, 1, 9, 9), r"uint8 \(B, 3, H, W\), but are torch.uint8 \(1, 1, 9, 9\)"),
        (lambda a, b: psnr_y(a, b, 4), (1, 3, 8, 9), "without a border of 4: at least 1 x 1"),
        (lambda a, b: psnr_y(a, b, -1), (1, 3, 8, 9), "crop=-1 is out of range"),
        (ssim_rgb_uniform, (1, 3, 6, 30), "1 x 6 x 30 pixels are too small: at least 7 x 7"),
        (lambda a, b: ssim_y_gaussian(a, b, 4), (1, 3, 18, 30), "border of 4: at least 11 x 11"),
    ],
)
def test_images_that_cannot_be_compared_get_one_line(function, shape, message):
    image = torch.zeros(shape, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message) as error:
        function(image, image)
    assert "\n" not in str(error.value)


def test_sizes_and_dtypes_that_differ_get_one_line():
    image, reference = pair()
    with pytest.raises(ValueError, match=r"2 x 24 x 29 cannot .* 2 x 23 x 29"):
        psnr_rgb(image, reference[:, :, 1:])
    with pytest.raises(ValueError, match=r"but are torch\.float32"):
        ssim_rgb_uniform(image, reference / 255)
