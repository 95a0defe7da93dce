"""NIQE: its definition, its published value, and what it does without the extra `naturalness`."""

import functools
import hashlib
import math
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import gamma

from datamodules.bicubic import downscale, upscale
from lightning_modules.quality import naturalness
from lightning_modules.quality.naturalness import Niqe, ParametersMissing

ROOT = Path(__file__).parents[1]
BABOON = ROOT / "data" / "sr" / "Set14" / "baboon.png"
halve = functools.partial(downscale, scale=2)


class Installed:
    """A distribution whose files are below a folder."""

    def __init__(self, folder):
        self.folder = folder

    def locate_file(self, path):
        return self.folder / path


@pytest.fixture
def parameters(tmp_path, monkeypatch):
    """Made-up parameters, as a package would have them: mean and covariance."""
    generator = np.random.default_rng(0)
    mean = generator.random((1, 36))
    root = generator.standard_normal((36, 36))
    path = tmp_path / naturalness.FILE
    path.parent.mkdir(parents=True)
    covariance = root @ root.T / 36 + np.eye(36)
    np.savez(path, mu_pris_param=mean, cov_pris_param=covariance)
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed(tmp_path))
    monkeypatch.setattr(naturalness, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return mean, covariance


@pytest.fixture
def published():
    """Skips a test where the extra is not installed."""
    try:
        naturalness.read_parameters()
    except ParametersMissing:
        pytest.skip("the extra `naturalness` is not installed")


def textured(n=1, height=208, width=300, seed=0):
    """Smooth images with noise, which have no flat region: uint8 (n, 3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(60, 190, (n, 3, height // 8 + 1, width // 8 + 1), generator=generator)
    fine = upscale(coarse.double(), 8)[:, :, :height, :width]
    noise = 6 * torch.randn(fine.shape, generator=generator, dtype=torch.float64)
    return (fine + noise).round().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------- its definition


def niqe_by_the_paper(image, mean, covariance):
    """NIQE of one image, (3, H, W), pixel by pixel: Mittal et al. 2013, equations 1 to 10."""
    red, green, blue = image.numpy().astype(float)
    luma = np.rint(16 + (65.481 * red + 128.553 * green + 24.966 * blue) / 255)
    luma = luma[: luma.shape[0] // 96 * 96, : luma.shape[1] // 96 * 96]
    grid = np.linspace(0.2, 10, 9801)
    table = gamma(2 / grid) ** 2 / gamma(1 / grid) / gamma(3 / grid)
    window = np.array(
        [[math.exp(-(i * i + j * j) * 18 / 49) for i in range(-3, 4)] for j in range(-3, 4)]
    )
    window /= window.sum()

    def fit(values):
        left = np.sqrt(np.mean(values[values < 0] ** 2))
        right = np.sqrt(np.mean(values[values > 0] ** 2))
        g = left / right
        r = np.mean(np.abs(values)) ** 2 / np.mean(values**2)
        r = r * (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2
        a = grid[np.abs(table - r).argmin()]
        return (
            a,
            left * np.sqrt(gamma(1 / a) / gamma(3 / a)),
            right * np.sqrt(gamma(1 / a) / gamma(3 / a)),
        )

    columns = []
    for side in (96, 48):
        padded = np.pad(luma, 3, mode="edge")
        patches = np.lib.stride_tricks.sliding_window_view(padded, (7, 7))
        local = np.einsum("ijkl,kl->ij", patches, window)
        spread = np.einsum("ijkl,kl->ij", (patches - local[..., None, None]) ** 2, window)
        normal = (luma - local) / (np.sqrt(spread) + 1)
        rows = []
        for top in range(0, luma.shape[0], side):
            for start in range(0, luma.shape[1], side):
                block = normal[top : top + side, start : start + side]
                alpha, left, right = fit(block)
                row = [alpha, (left + right) / 2]
                for down, across in ((0, -1), (-1, 0), (-1, -1), (-1, 1)):
                    down_index = (np.arange(side) + down) % side
                    across_index = (np.arange(side) + across) % side
                    neighbour = block[down_index][:, across_index]
                    alpha, left, right = fit(block * neighbour)
                    eta = (right - left) * gamma(2 / alpha) / gamma(1 / alpha)
                    row += [alpha, eta, left, right]
                rows.append(row)
        columns.append(rows)
        luma = halve(torch.from_numpy(luma)[None, None])[0, 0].numpy()
    features = np.concatenate(columns, axis=1)
    difference = mean.ravel() - features.mean(0)
    inverse = np.linalg.pinv((covariance + np.cov(features.T)) / 2)
    return math.sqrt(difference @ inverse @ difference)


def test_niqe_is_computed_as_its_paper_writes(parameters):
    images = textured(n=2)
    expected = [niqe_by_the_paper(image, *parameters) for image in images]
    values = Niqe(halve)(images)
    assert values.dtype == torch.float64
    assert values.tolist() == pytest.approx(expected, rel=1e-9)
    assert abs(expected[0] - expected[1]) > 1e-3
    # What does not fill a block, below and at the right, has no influence.
    assert Niqe(halve)(images[:, :, :192, :288]).tolist() == values.tolist()


def test_the_moments_of_a_generalized_gaussian_by_hand():
    """Shape 2 is the Gaussian, whose width is its deviation times the square root of 2."""
    generator = np.random.default_rng(0)
    shape, left, right = naturalness.generalized_gaussian(generator.normal(0, 3, 400_000))
    assert shape == pytest.approx(2, abs=0.02)
    assert left == pytest.approx(3 * math.sqrt(2), rel=0.01)
    assert right == pytest.approx(3 * math.sqrt(2), rel=0.01)
    # Laplace's distribution has the shape 1, here twice as wide on the right.
    laplace = np.abs(generator.laplace(0, 1, 400_000))
    sides = np.where(generator.random(400_000) < 2 / 3, 2 * laplace, -laplace)
    shape, left, right = naturalness.generalized_gaussian(sides)
    assert shape == pytest.approx(1, abs=0.02)
    assert (left, right) == pytest.approx((1, 2), rel=0.02)
    shape, left, right = naturalness.generalized_gaussian(np.array([1.0, 2.0]))
    assert math.isnan(left)
    assert shape == pytest.approx(0.2)


def test_rounding_in_a_flat_region_does_not_count(parameters):
    """The features do not change when all levels rise by the same number."""
    levels = textured()[:, :1].double()
    levels[:, :, 20:90, 20:280] = 113
    values = [Niqe(halve).of_luma(levels + offset) for offset in (0, 1, 3, 7.3)]
    assert values == pytest.approx([values[0]] * 4, rel=1e-9)


@pytest.mark.data
def test_matlab_has_the_same_value_of_a_published_example(published):
    """The authors' code in MATLAB R2021a, as the repository BasicSR gives it for this image."""
    if not BABOON.is_file():
        pytest.skip("Set14 is not in data/sr")
    pixels = np.asarray(Image.open(BABOON).convert("RGB"))
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    assert Niqe(halve)(image).item() == pytest.approx(5.72957338, abs=2e-6)


def test_the_package_with_the_parameters_has_the_same_values(published, monkeypatch):
    """Its arithmetic is that of BasicSR. It agrees where no region is flat."""
    package = pytest.importorskip("iqa.niqe")
    core = package.niqe_core
    # Recent versions of NumPy do not make a number of its (1, 1) result by `float`.
    monkeypatch.setattr(core, "float", lambda value: np.asarray(value).item(), raising=False)
    images = textured(n=2)
    expected = [package.niqe(image[None], test_y_channel=True).item() for image in images]
    assert Niqe(halve)(images).tolist() == pytest.approx(expected, rel=1e-4)


# --------------------------------------------------------------- without the extra, and bad input


def test_without_the_extra_a_line_says_how_to_install_it(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(ParametersMissing) as caught:
        Niqe(halve)
    assert str(caught.value) == (
        "the parameters of NIQE are not installed: run pip install iqa-torch==1.2.1"
    )


def test_the_extra_is_the_package_with_the_parameters():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [requirement] = settings["project"]["optional-dependencies"]["naturalness"]
    assert requirement == f"{naturalness.PACKAGE}=={naturalness.VERSION}"


def test_other_parameters_are_refused(parameters, monkeypatch):
    monkeypatch.setattr(naturalness, "SHA256", "0" * 64)
    with pytest.raises(ParametersMissing, match=r"the published one 00000000: run pip install"):
        Niqe(halve)


def test_a_package_without_the_file_counts_as_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed(tmp_path))
    with pytest.raises(ParametersMissing, match="are not installed"):
        Niqe(halve)


def test_images_that_have_no_niqe(parameters):
    niqe = Niqe(halve)
    with pytest.raises(ValueError, match=r"uint8 \(B, 3, H, W\), but are torch.float32"):
        niqe(torch.zeros(1, 3, 200, 200))
    with pytest.raises(ValueError, match="160 x 160 pixels are too small for NIQE: give at least"):
        niqe(textured(height=160, width=160))
    with pytest.raises(ValueError, match="fewer than 2 blocks with any texture"):
        niqe(torch.full((1, 3, 192, 192), 80, dtype=torch.uint8))
