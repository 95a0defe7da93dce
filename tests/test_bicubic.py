"""MATLAB's bicubic resizing, against its kernel written as a dense matrix."""

import numpy as np
import pytest
import torch

from datamodules.bicubic import downscale, upscale


def cubic(x):
    """Keys' kernel with a = -1/2."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0))


def matrix(old, new):
    """The weights of MATLAB's imresize along an axis of `old` pixels: (new, old)."""
    widening = max(old / new, 1)
    weights = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        first = int(np.floor(centre - 2 * widening))
        positions = np.arange(first, first + int(4 * widening) + 3)
        values = cubic((centre - positions) / widening)
        values /= values.sum()
        folded = np.concatenate([np.arange(old), np.arange(old)[::-1]])  # one period of the mirror
        np.add.at(weights[i], folded[positions % (2 * old)], values)
    return weights


def dense(images, size, after_vertical=lambda x: x):
    """Images (B, C, H, W) resized by two dense matrices in float64, without rounding the result."""
    vertical = matrix(images.shape[2], size[0]) @ images.double().numpy()
    return after_vertical(vertical) @ matrix(images.shape[3], size[1]).T


def as_levels(values):
    return np.clip(np.floor(values + 0.5), 0, 255)


def random_images(height, width, seed=0):
    """Black, white and all levels between, so that the kernel's overshoots have to be clipped."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 3, height, width, generator=generator) * 400 - 70
    return images.clamp(0, 255).round().to(torch.uint8)


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 2), (12, 9)])
def test_it_is_the_kernel_of_matlab_with_the_borders(scale, height, width):
    """Also of images that are smaller than the kernel, and so are mirrored several times."""
    large = random_images(height * scale, width * scale).double()
    expected = dense(large, (height, width))
    np.testing.assert_allclose(downscale(large, scale).numpy(), expected, rtol=0, atol=1e-10)
    small = random_images(height, width).double()
    expected = dense(small, (height * scale, width * scale))
    np.testing.assert_allclose(upscale(small, scale).numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_uint8_images_are_rounded_once_or_after_each_axis(scale):
    """The weights of these scales are exact in binary, and so are halves, which are rounded up."""
    size = (12, 9)
    large = random_images(size[0] * scale, size[1] * scale)
    once = as_levels(dense(large, size))
    per_axis = as_levels(dense(large, size, as_levels))
    assert downscale(large, scale).dtype == torch.uint8
    np.testing.assert_array_equal(downscale(large, scale).numpy(), once)
    np.testing.assert_array_equal(downscale(large, scale, rounding="axis").numpy(), per_axis)
    assert 0.02 < np.mean(once != per_axis) < 0.3
    larger = (size[0] * scale, size[1] * scale)
    small = random_images(*size)
    np.testing.assert_array_equal(upscale(small, scale).numpy(), as_levels(dense(small, larger)))
    per_axis = as_levels(dense(small, larger, as_levels))
    np.testing.assert_array_equal(upscale(small, scale, rounding="axis").numpy(), per_axis)


def test_the_weights_of_scale_2_by_hand():
    """Keys' kernel at 1/4, 3/4, 5/4 and 7/4, as 256ths."""
    spike = torch.zeros(1, 1, 1, 24, dtype=torch.float64)
    spike[..., 12] = 256
    row = downscale(spike.expand(1, 1, 2, 24), 2)[0, 0, 0]
    assert row[4:9].tolist() == [-3, 29, 111, -9, 0]
    row = upscale(spike[..., 8:17], 2)[0, 0, 0]
    assert row[5:13].tolist() == [-6, -18, 58, 222, 222, 58, -18, -6]


def test_a_constant_image_stays_and_scale_1_is_the_identity():
    constant = torch.full((1, 3, 8, 8), 201, dtype=torch.uint8)
    assert downscale(constant, 8).unique().tolist() == [201]
    assert upscale(constant, 3).unique().tolist() == [201]
    images = random_images(5, 6)
    assert downscale(images, 1).equal(images)
    assert upscale(images, 1, "axis").equal(images)


def test_floating_point_images_keep_their_dtype_and_have_gradients():
    images = torch.rand(1, 3, 8, 8, requires_grad=True)
    small = downscale(images, 4)
    assert small.dtype == torch.float32
    small.sum().backward()
    assert images.grad.sum().item() == pytest.approx(3 * 2 * 2, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1, 3, 8, 10), 4), "8 x 10 pixels cannot be downscaled by 4: crop them"),
        ((torch.zeros(3, 8, 8), 4), r"\(B, C, H, W\), but are torch.float32 \(3, 8, 8\)"),
        ((torch.zeros(1, 3, 8, 8, dtype=torch.int64), 4), "but are torch.int64"),
        ((torch.zeros(1, 3, 8, 8), 0), "scale=0 is out of range"),
        ((torch.zeros(1, 3, 8, 8), 2.0), "scale=2.0 is out of range"),
        ((torch.zeros(1, 3, 8, 8), 2, "twice"), "rounding=twice is unknown: give once or axis"),
    ],
)
def test_arguments_that_cannot_be_used_get_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        downscale(*arguments)
    assert "\n" not in str(error.value)
