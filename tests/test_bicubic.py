"""MATLAB's bicubic resizing against its kernel as a dense matrix, and reproduce.bicubic."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import save_image
from PIL import Image

from datamodules.bicubic import downscale, upscale
from lightning_modules.quality.super_resolution import psnr_rgb, psnr_y
from reproduce import bicubic
from results import super_resolution
from results.blocks import markdown


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


# The command


def make_set(root, name="mine", n=2, **image):
    for k in range(n):
        save_image(root / name / f"{k}.png", **({"height": 47, "width": 50} | image), seed=k)


def run(root, *words):
    """The content of the file that the command writes; it is read again, as the page reads it."""
    out = root / "bicubic.json"
    bicubic.main([f"root={root}", f"out={out}", *words])
    return super_resolution.read(out)


def test_the_command_measures_a_folder_by_every_definition(tmp_path, capsys):
    make_set(tmp_path)
    content = run(tmp_path, "sets=[mine]", "scale=4")
    [measured] = content["sets"].values()
    assert set(measured["definitions"]) == set(super_resolution.DEFINITIONS)
    pixels = [Image.open(tmp_path / "mine" / f"{k}.png") for k in range(2)]
    true = [torch.from_numpy(np.array(image)).movedim(2, 0)[None, :, :44, :48] for image in pixels]
    low = [downscale(image, 4) for image in true]
    high = [upscale(image, 4) for image in low]
    expected = {
        "test/psnr": [psnr_rgb(*pair) for pair in zip(high, true, strict=True)],
        "test/psnr_y": [psnr_y(*pair, crop=4) for pair in zip(high, true, strict=True)],
        "test/lr_psnr": [psnr_rgb(downscale(a, 4), b) for a, b in zip(high, low, strict=True)],
    }
    for name, values in expected.items():
        assert measured["metrics"][name] == pytest.approx(sum(map(float, values)) / 2, abs=1e-10)
    squares = [
        (a.double() - b.double()).square().mean().item() for a, b in zip(high, true, strict=True)
    ]
    pooled = 10 * np.log10(255**2 / np.mean(squares))
    assert measured["definitions"]["rgb/pooled"]["psnr"] == pytest.approx(pooled, abs=1e-10)
    assert measured["images"] == 2
    assert content["protocol"]["test/psnr_y"]["crop"] == 4
    line = f"| mine | 4 | 2 | {measured['metrics']['test/psnr']:.2f} |"
    assert line in capsys.readouterr().out


def test_images_of_one_colour_have_an_infinite_psnr_without_a_warning(tmp_path, recwarn):
    (tmp_path / "plain").mkdir()
    Image.new("RGB", (48, 44), (9, 9, 9)).save(tmp_path / "plain" / "0.png")
    content = run(tmp_path, "sets=[plain]")
    assert content["sets"]["plain"]["metrics"]["test/psnr"] is None
    assert content["sets"]["plain"]["metrics"]["test/ssim"] == 1
    assert [str(each.message) for each in recwarn if each.category is RuntimeWarning] == []


def test_other_definitions_differ_where_they_should(tmp_path):
    """The levels of a grey file are 255/219 as far apart as their luma: 1.32 dB."""
    make_set(tmp_path, channels=1)
    values = run(tmp_path, "sets=[mine]", "scale=2")["sets"]["mine"]["definitions"]
    lower = values["y"]["psnr"] - values["y/grey"]["psnr"]
    assert lower == pytest.approx(20 * np.log10(255 / 219), abs=1e-9)
    assert values["lr/floor"]["psnr"] < values["lr"]["psnr"]
    assert values["lr/unmirrored"]["psnr"] < values["lr"]["psnr"]


def test_a_short_run_has_only_what_is_logged_and_missing_sets_are_named(tmp_path, capsys):
    make_set(tmp_path, "Set5", n=5)
    content = run(tmp_path, "definitions=false")
    assert list(content["sets"]) == ["Set5"]
    assert content["sets"]["Set5"]["definitions"] == {}
    printed = capsys.readouterr()
    assert "not measured: DIV2K is not in" in printed.err
    assert "(28.42)" in printed.out
    again = run(tmp_path, "definitions=false")  # replaces its own file
    assert again == content


def test_mistakes_are_one_line_and_leave_files_alone(tmp_path, capsys):
    make_set(tmp_path, "small", height=16, width=40)
    (tmp_path / "bicubic.json").write_text("mine")

    def line(*words):
        with pytest.raises(SystemExit) as stop:
            bicubic.main([f"root={tmp_path}", *words])
        assert stop.value.code not in (None, 0)
        text = f"{stop.value.code} {capsys.readouterr().err}"
        assert text.strip().count("\n") == 0
        return text

    out = f"out={tmp_path / 'a.json'}"
    assert "give another out=" in line(f"out={tmp_path / 'bicubic.json'}")
    assert (tmp_path / "bicubic.json").read_text() == "mine"
    too_small = line(out, "sets=[small]")
    assert "0.png is too small for scale=4 (images of 1 x 16 x 40 pixels" in too_small
    assert "take it away, or give a smaller scale=" in too_small
    assert "take it away, or give a smaller scale" in line(out, "sets=[small]", "scale=17")
    assert "has none of the folders Set5, " in line(out)  # and no line for each of the five
    with pytest.raises(SystemExit, match=r"no folder .*none: give root=FOLDER"):
        bicubic.main([f"root={tmp_path / 'none'}"])
    assert "Set5 is not in" in line(out, "sets=[Set5]")
    assert "give another out=" in line("out=/dev/null/a.json", "sets=small", "definitions=false")
    assert "scale=1 is out of range" in line(out, "scale=1")
    assert not (tmp_path / "a.json").exists()


# The page's section


def recorded(name="Set5", scale=4):
    metrics = {f"test/{metric}": 20.0 for metric in super_resolution.METRICS}
    one = {"images": 5, "sha256": "0", "metrics": metrics}
    return {
        "model": "bicubic",
        "scale": scale,
        "arguments": ["root=sr", f"scale={scale}"],
        "sets": {name: one | {"definitions": {"rgb": {"psnr": 20.0, "ssim": 0.5}}}},
        "protocol": {},
        "commit": "0123456789",
        "dirty": False,
        "versions": {},
    }


def test_the_section_has_published_figures_also_of_sets_that_nobody_has_run(tmp_path):
    path = tmp_path / "super_resolution" / "a.json"
    assert super_resolution.section(tmp_path) == []
    blocks = super_resolution.section(tmp_path, {path: json.dumps(recorded()).encode()})
    lines = "\n".join(markdown(blocks))
    assert "python -m reproduce.bicubic root=sr scale=4" in lines
    assert "| Set5 | 4 | 5 | 20.00 | 20.0000 | 20.00 (28.42) | 20.0000 (0.8104) |" in lines
    assert "| DIV2K | 4 | not run | - (26.70) | - (0.7700) | - | - | - (38.70) |" in lines
    assert "| Set5 | 4 | not run |" not in lines  # it has its line already
    assert "| 20.00 / 0.5000 |" in lines
    assert "| 28.42 / 0.8104 |" in lines


def test_every_published_figure_has_a_source():
    assert {row.source for row in super_resolution.PUBLISHED} == set(super_resolution.SOURCES)


def test_a_damaged_file_is_one_line(tmp_path):
    path = tmp_path / "super_resolution" / "a.json"
    content = recorded()
    del content["sets"]["Set5"]["metrics"]["test/ssim"]
    with pytest.raises(ValueError, match=r"a\.json is not what .*no usable sets\.Set5\.metrics"):
        super_resolution.section(tmp_path, {path: json.dumps(content).encode()})


def test_the_recorded_figures_are_the_published_ones():
    """By the definition that comes closest: 0.01 dB in PSNR, and 0.001 in SSIM."""
    files = {file["scale"]: file for file in super_resolution.read_all()}
    for row in super_resolution.PUBLISHED:
        if row.name == "DIV2K" or row.scale != 4:
            continue
        values = files[row.scale]["sets"][row.name]["definitions"]["y/luma_first"]
        assert values["psnr"] == pytest.approx(row.values["psnr_y"], abs=0.01)
        assert values["ssim"] == pytest.approx(row.values["ssim_y"], abs=0.001)


@pytest.mark.data
def test_set5_has_the_recorded_figures(tmp_path):
    root = Path(__file__).parents[1] / "data" / "sr"
    if not (root / "Set5").is_dir():
        pytest.skip("Set5 is not in data/sr")
    bicubic.main([f"root={root}", "sets=[Set5]", f"out={tmp_path / 'a.json'}"])
    [expected] = [file for file in super_resolution.read_all() if file["scale"] == 4]
    measured = super_resolution.read(tmp_path / "a.json")["sets"]["Set5"]
    assert measured["sha256"] == expected["sets"]["Set5"]["sha256"]
    assert measured["metrics"] == pytest.approx(expected["sets"]["Set5"]["metrics"], abs=1e-6)
