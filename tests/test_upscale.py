"""reproduce.upscale: tiles, files and what is in them, the strip, going on, mistakes."""

import itertools
import math

import numpy as np
import pytest
import torch
from image_folders import save_image
from PIL import Image, ImageCms
from torch import nn

from datamodules.bicubic import downscale, upscale
from datamodules.image_files import read_picture
from flows.srflow import RRDB, SRFlow
from lightning_modules.quality.super_resolution import as_uint8, psnr_rgb
from lightning_modules.regression import RegressionModule
from lightning_modules.super_resolution import SuperResolutionModule
from reproduce import comparison, rrdb_bsds_x4, srflow_photos_x4
from reproduce import upscale as command
from reproduce.config import ConfigError
from reproduce.enlargers import Enlarger, FlowEnlarger, NetworkEnlarger, enlarge, tiles_of
from reproduce.tiles import Blend, Tile, spans, tiles, weights

TINY = {"depth": 1, "hidden_channels": 4, "encoder_blocks": 2, "encoder_channels": 4}
TINY |= {"encoder_growth": 2, "stacked": (0, 1)}
RUN = [
    *("logger.name=none", "trainer.accelerator=cpu", "trainer.max_steps=2", "samples.n=2"),
    *("trainer.precision=32-true", "trainer.val_check_interval=2", "checkpoint.every_n_steps=2"),
    *("data.root=null", "data.test_root=null", "data.n_val=1", "data.batch_size=2"),
    *("data.crop=32", "data.epoch_images=32", "data.num_workers=0", "trainer.limit_test_batches=1"),
    *("trainer.limit_val_batches=1", "samples.every_n_steps=2", "optim.warmup_steps=0"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder in which the models were trained. Absolute paths are left out of their recipes."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def rrdb(home):
    """The folder of a finished run of RRDB."""
    folder = home / "runs" / "rrdb"
    flow = ["flow.n_blocks=2", "flow.channels=4", "flow.growth=2"]
    rrdb_bsds_x4.main([*RUN, *flow, f"run_dir={folder}"])
    return folder


@pytest.fixture(scope="module")
def srflow(home, rrdb):
    """The folder of a finished run of SRFlow, whose encoder comes from RRDB."""
    folder = home / "runs" / "srflow"
    flow = [f"flow.{key}={list(v) if key == 'stacked' else v}" for key, v in TINY.items()]
    encoder = "flow.encoder_checkpoint=runs/rrdb"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        srflow_photos_x4.main([*RUN, *flow, encoder, "eval.samples=1", f"run_dir={folder}"])
    return folder


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    """The commands find the RRDB by the path with which the model was trained."""
    monkeypatch.chdir(home)


@pytest.fixture
def photo(tmp_path):
    """A photograph of 13 x 22 pixels."""
    save_image(tmp_path / "photo.png", height=13, width=22, seed=3)
    return tmp_path / "photo.png"


def call(*words):
    command.main([str(word) for word in words])


def refused(*words):
    with pytest.raises(SystemExit) as stop:
        call(*words)
    assert isinstance(stop.value.code, str)
    assert "\n" not in stop.value.code
    return stop.value.code.removeprefix("error: ")


def pixels_of(path):
    """The pixels of a file, (C, H, W) uint8."""
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def random_flow(scale=4, n_levels=3):
    """A tiny SRFlow whose networks do something, unlike those of an untrained one."""
    torch.manual_seed(0)
    flow = SRFlow(scale=scale, n_levels=n_levels, **TINY)
    low_res = torch.rand(8, 3, 16, 16)
    flow.initialize(torch.rand(8, 3, 16 * scale, 16 * scale), low_res)
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "conditioner" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return flow.eval().requires_grad_(False)


def flow_enlarger(n=1, temperature=0.8, seed=0, **arguments):
    module = SuperResolutionModule(random_flow(**arguments), None, 8, 0, shape=(3, 16, 16))
    return FlowEnlarger(module.eval(), n, temperature, seed)


def network_enlarger():
    torch.manual_seed(0)
    network = RRDB(n_blocks=2, channels=4, growth=2).eval().requires_grad_(False)
    return NetworkEnlarger(RegressionModule(network, (3, 16, 16), 8, 0))


def random_image(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


# ---------------------------------------------------------------------- tiles


@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize("overlap", [0, 1, 3])
@pytest.mark.parametrize("side", [8, 10])
def test_tiles_cover_an_axis_and_overlap(multiple, overlap, side):
    for length in range(1, 60):
        found = spans(length * multiple, side * multiple, overlap * multiple, multiple)
        assert found[0][0] == 0
        assert found[-1][1] == length * multiple
        assert all(bound % multiple == 0 for pair in found for bound in pair)
        assert all(stop - start <= side * multiple for start, stop in found)
        for one, other in itertools.pairwise(found):
            assert one[1] - other[0] >= overlap * multiple
            assert one[0] < other[0]
        fewest = max(1, math.ceil((length - overlap) / (side - overlap)))
        assert len(found) == fewest


def test_tiles_of_an_image_row_by_row():
    assert tiles((4, 6), side=4, overlap=2, multiple=2) == [Tile(0, 4, 0, 4), Tile(0, 4, 2, 6)]
    assert tiles((4, 6), side=0, overlap=2, multiple=2) == [Tile(0, 4, 0, 6)]
    assert Tile(0, 4, 2, 6).times(2) == Tile(0, 8, 4, 12)


@pytest.mark.parametrize("overlap", [0, 2, 5])
def test_an_image_in_tiles_is_put_together_again(overlap):
    image = torch.rand(2, 3, 37, 50)
    blend = Blend(image.shape, overlap)
    parts = tiles((37, 50), side=16, overlap=overlap, multiple=1)
    for tile in parts:
        blend.add(tile, tile.of(image))
    torch.testing.assert_close(blend.image(), image, atol=1e-6, rtol=0)
    assert blend.mean_difference() < 1e-4
    assert len(parts) > 6


def test_tiles_that_differ_pass_into_each_other_without_a_step():
    blend = Blend((1, 4, 24), overlap=8)
    blend.add(Tile(0, 4, 0, 16), torch.zeros(1, 4, 16))
    blend.add(Tile(0, 4, 8, 24), torch.full((1, 4, 16), 0.1))
    row = blend.image()[0, 0]
    assert row[:10].eq(0).all()  # two pixels of the overlap do not count in the other tile
    torch.testing.assert_close(row[14:], torch.full((10,), 0.1))
    assert row.diff().max() < 0.03
    assert blend.mean_difference() == pytest.approx(25.5, rel=1e-4)


def test_pixels_at_the_border_of_the_image_count():
    assert weights(0, 4, length=4, overlap=2).tolist() == [1, 1, 1, 1]
    assert weights(4, 8, length=8, overlap=2).tolist() == [0, 1, 1, 1]


def test_what_is_not_finite_stays_in_its_tile():
    blend = Blend((3, 4, 24), overlap=8)
    broken = torch.zeros(3, 4, 16)
    broken[:, :, 15] = torch.nan  # at the border, where it does not count
    blend.add(Tile(0, 4, 0, 16), broken)
    blend.add(Tile(0, 4, 8, 24), torch.ones(3, 4, 16))
    assert blend.image().isfinite().all()
    assert math.isfinite(blend.mean_difference())


class Repeating(Enlarger):
    """Repeats each pixel, and knows what each tile was."""

    scale = 4
    multiple = 2
    n = 1
    network = nn.Linear(1, 1)

    def begin(self, size):
        self.size = size
        self.seen = []

    def tile(self, low_res, tile):
        assert tile.size == tuple(low_res.shape[1:])
        self.seen.append(tile)
        return low_res.repeat_interleave(4, 1).repeat_interleave(4, 2)[None]


@pytest.mark.parametrize("size", [(1, 1), (5, 31), (16, 16), (33, 6)])
def test_images_of_any_size_are_padded_and_cut_off_again(size):
    image = random_image(*size)
    model = Repeating()
    enlarged = enlarge(model, image, side=64, overlap=8)
    expected = image.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert as_uint8(enlarged.images)[0].equal(expected)
    assert model.seen == tiles_of(model, image, 64, 8)
    assert len(model.seen) == enlarged.n_tiles
    assert all(max(tile.size) <= 16 for tile in model.seen)
    assert all(side % 2 == 0 for side in model.size)


def test_sides_and_overlaps_of_tiles_fit_the_model():
    model = Repeating()
    image = random_image(40, 40)
    assert [tile.size for tile in tiles_of(model, image, side=0, overlap=8)] == [(40, 40)]
    smallest = tiles_of(model, image, side=1, overlap=0)
    assert {tile.size for tile in smallest} == {(2, 2)}
    columns = {(t.left, t.right) for t in tiles_of(model, image, side=100, overlap=10)}
    ordered = sorted(columns)
    assert all(one[1] - other[0] >= 4 for one, other in itertools.pairwise(ordered))
    assert max(right - left for left, right in columns) == 24


def test_a_tile_that_does_not_fit_the_memory_gets_one_line():
    class Large(Repeating):
        def tile(self, low_res, tile):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(
        ConfigError, match=r"a tile of 80x64 pixels .* the GPU has: give tile=40 overlap=20$"
    ):
        enlarge(Large(), random_image(16, 20), side=0, overlap=96)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_tiles_of_a_flow_hardly_show(temperature):
    """They have the latents of the whole image, so only the borders of tiles could show."""
    model = flow_enlarger(n=2, temperature=temperature)
    image = random_image(72, 72)
    whole = enlarge(model, image, side=0, overlap=80)
    tiled = enlarge(model, image, side=192, overlap=80)
    assert (whole.n_tiles, tiled.n_tiles) == (1, 4)
    difference = 255 * (tiled.images - whole.images).abs()
    assert difference.mean() < 0.02
    assert difference.max() < 1
    assert tiled.difference < 0.1
    apart = enlarge(model, image, side=96, overlap=0)
    assert 255 * (apart.images - whole.images).abs().max() > 10
    if temperature:
        assert (whole.images[0] - whole.images[1]).abs().mean() > 0.01


def test_tiles_of_a_network_hardly_show():
    model = network_enlarger()
    image = random_image(40, 44)
    whole = enlarge(model, image, side=0, overlap=32)
    tiled = enlarge(model, image, side=96, overlap=32)
    assert tiled.n_tiles == 6
    assert 255 * (tiled.images - whole.images).abs().max() < 0.5


@pytest.mark.parametrize(("scale", "n_levels"), [(4, 3), (8, 4), (2, 2)])
def test_samples_are_those_of_the_flow_for_the_latents_of_the_seed(scale, n_levels):
    model = flow_enlarger(n=2, temperature=0.7, seed=5, scale=scale, n_levels=n_levels)
    image = random_image(8, 12)
    made = enlarge(model, image, side=0, overlap=0).images
    context = (image / 255)[None]
    for k in range(2):
        key = int(np.random.SeedSequence([5, k]).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(key)
        expected = model.flow.sample(1, 0.7, context, generator=generator)[0, 0]
        torch.testing.assert_close(made[k], expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------- files


def test_the_files_of_an_image(srflow, rrdb, photo, tmp_path, capsys):
    out = tmp_path / "out"
    call(srflow, photo, f"out={out}", "samples=3", "seed=4", "temperature=0.8")
    names = [*(f"photo_x4_{k}.png" for k in (1, 2, 3)), "photo_x4_strip.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    lines = capsys.readouterr().out.splitlines()
    images = [pixels_of(out / name) for name in names[:3]]
    assert {tuple(image.shape) for image in images} == {(3, 52, 88)}
    low_res = pixels_of(photo)
    values = [psnr_rgb(downscale(i[None], 4), low_res[None]).item() for i in images]
    assert lines[0].startswith(
        f"{out / names[0]} and 2 more: 88x52, LR-PSNR {min(values):.2f} to {max(values):.2f} dB, "
    )
    deviation = torch.stack(images).double().std(0).mean()
    assert lines[0].endswith(f"spread {deviation:.2f} grey levels")
    assert lines[1].startswith(
        f"{out / names[3]}: low resolution, bicubic, RRDB, sample 1, T=0.8, sample 2, T=0.8, "
    )


def test_values_are_rounded(srflow, photo, tmp_path):
    """SRFlow's release rounds down, which costs up to 2 dB of LR-PSNR."""
    out = tmp_path / "out"
    call(srflow, photo, f"out={out}", "strip=false", "seed=4")
    from reproduce import load

    model = load(srflow)
    module = model._objective
    assert isinstance(module, SuperResolutionModule)
    enlarger = FlowEnlarger(module, 1, module.temperature, 4)
    image = enlarge(enlarger, pixels_of(photo), 0, 0).images[0]
    assert pixels_of(out / "photo_x4_1.png").equal(
        (255 * image.double().clamp(0, 1)).round().to(torch.uint8)
    )
    assert module.temperature == 0.9  # the default


def test_a_sample_does_not_depend_on_their_number(srflow, photo, tmp_path):
    words = (srflow, photo, "strip=false", "temperature=0.7")
    call(*words, f"out={tmp_path / 'one'}")
    call(*words, f"out={tmp_path / 'two'}", "samples=2")
    call(*words, f"out={tmp_path / 'other'}", "seed=1")
    first = pixels_of(tmp_path / "one" / "photo_x4_1.png")
    assert first.equal(pixels_of(tmp_path / "two" / "photo_x4_1.png"))
    assert not first.equal(pixels_of(tmp_path / "two" / "photo_x4_2.png"))
    assert not first.equal(pixels_of(tmp_path / "other" / "photo_x4_1.png"))


def test_at_temperature_0_all_samples_are_equal(srflow, photo, tmp_path, capsys):
    call(srflow, photo, f"out={tmp_path}", "samples=2", "temperature=0")
    first = pixels_of(tmp_path / "photo_x4_1.png")
    assert first.equal(pixels_of(tmp_path / "photo_x4_2.png"))
    assert "spread 0.00 grey levels" in capsys.readouterr().out


def test_rrdb_makes_one_image(rrdb, photo, tmp_path, capsys):
    call(rrdb, photo, f"out={tmp_path / 'out'}", "samples=3")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "photo_x4_1.png",
        "photo_x4_strip.png",
    ]
    assert capsys.readouterr().out.endswith("strip.png: low resolution, bicubic, RRDB\n")


def test_opacity_is_enlarged_and_the_profile_is_kept(srflow, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = random_image(6, 9).permute(1, 2, 0).numpy()
    opacity = random_image(6, 9, seed=1)[0].numpy()
    image = Image.fromarray(np.dstack([pixels, opacity]))
    image.save(tmp_path / "a.png", icc_profile=profile)
    call(srflow, tmp_path / "a.png", f"out={tmp_path / 'out'}")
    made = Image.open(tmp_path / "out" / "a_x4_1.png")
    assert (made.mode, made.size, made.info["icc_profile"]) == ("RGBA", (36, 24), profile)
    expected = upscale(torch.from_numpy(opacity)[None, None], 4)[0, 0]
    assert torch.from_numpy(np.array(made)[:, :, 3]).equal(expected)
    Image.fromarray(pixels).save(tmp_path / "b.png")
    call(srflow, tmp_path / "b.png", f"out={tmp_path / 'out'}")
    opaque = Image.open(tmp_path / "out" / "b_x4_1.png")
    assert np.array_equal(np.array(made)[:, :, :3], np.array(opaque))
    assert opaque.mode == "RGB"


def test_pictures_of_all_modes_are_read(tmp_path):
    colour = Image.fromarray(random_image(4, 6).permute(1, 2, 0).numpy())
    for name, mode in (("L", "L"), ("P", "P"), ("1", "1"), ("LA", "LA"), ("RGBA", "RGBA")):
        colour.convert(mode).save(tmp_path / f"{name}.png")
        picture = read_picture(tmp_path / f"{name}.png")
        expected = np.array(colour.convert(mode).convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(picture.pixels, expected)
        assert (picture.opacity is not None) == (mode in ("LA", "RGBA"))
    turned = Image.Exif()
    turned[0x0112] = 6
    colour.save(tmp_path / "turned.png", exif=turned)
    picture = read_picture(tmp_path / "turned.png")
    assert np.array_equal(picture.pixels, np.rot90(np.array(colour), -1).transpose(2, 0, 1))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (2, 3)])
def test_the_smallest_images(srflow, tmp_path, height, width):
    save_image(tmp_path / "small.png", height, width)
    call(srflow, tmp_path / "small.png", f"out={tmp_path / 'out'}", "samples=2")
    assert pixels_of(tmp_path / "out" / "small_x4_2.png").shape == (3, 4 * height, 4 * width)


def test_a_folder_of_images(srflow, tmp_path, capsys):
    save_image(tmp_path / "in" / "a.png", 5, 6)
    save_image(tmp_path / "in" / "deep" / "b.jpg", 7, 8, seed=1)
    call(srflow, tmp_path / "in", f"out={tmp_path / 'out'}", "strip=false")
    assert pixels_of(tmp_path / "out" / "a_x4_1.png").shape == (3, 20, 24)
    assert pixels_of(tmp_path / "out" / "deep" / "b_x4_1.png").shape == (3, 28, 32)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_large_image_is_computed_in_tiles(srflow, tmp_path, capsys):
    save_image(tmp_path / "large.png", 40, 20)
    words = (srflow, tmp_path / "large.png", "strip=false")
    call(*words, f"out={tmp_path / 'tiled'}", "tile=64", "overlap=32")
    assert ", 8 tiles, which differ by 0." in capsys.readouterr().out
    call(*words, f"out={tmp_path / 'whole'}", "tile=0")
    assert "tiles" not in capsys.readouterr().out
    tiled = pixels_of(tmp_path / "tiled" / "large_x4_1.png").int()
    whole = pixels_of(tmp_path / "whole" / "large_x4_1.png").int()
    assert (tiled - whole).abs().max() <= 1


# ---------------------------------------------------------------------- going on


def test_complete_images_are_left_out_and_damaged_files_refused(srflow, photo, tmp_path, capsys):
    words = (srflow, photo, f"out={tmp_path / 'out'}", "samples=2")
    call(*words)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    call(*words)
    assert capsys.readouterr().out == f"{photo}: its files are there already\n"
    (tmp_path / "out" / "photo_x4_2.png").unlink()
    call(*words)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "photo_x4_2.png").write_bytes(before[tmp_path / "out" / "photo_x4_1.png"])
    assert "photo_x4_2.png is there already, and not of this command" in refused(*words)
    (tmp_path / "out" / "photo_x4_1.png").write_bytes(b"")
    assert "photo_x4_1.png is there already, and not of this command" in refused(*words)


@pytest.mark.parametrize("change", ["temperature=0.5", "seed=1", "tile=256", "model", "image"])
def test_files_of_another_command_are_not_replaced(srflow, rrdb, photo, tmp_path, change):
    out = f"out={tmp_path / 'out'}"
    call(srflow, photo, out)
    before = (tmp_path / "out" / "photo_x4_1.png").read_bytes()
    words = [srflow, photo, out]
    if change == "model":
        words[0] = rrdb
    elif change == "image":
        save_image(photo, 13, 22, seed=9)
    else:
        words.append(change)
    line = refused(*words)
    assert line == (
        f"{tmp_path / 'out' / 'photo_x4_1.png'} is there already, and not of this command: "
        "give another out="
    )
    assert (tmp_path / "out" / "photo_x4_1.png").read_bytes() == before


def test_the_image_itself_is_not_replaced(srflow, photo):
    before = photo.read_bytes()
    call(srflow, photo, f"out={photo.parent}")
    assert photo.read_bytes() == before


def test_a_strip_of_another_rrdb_is_not_replaced(srflow, photo, tmp_path):
    call(srflow, photo, f"out={tmp_path / 'out'}")
    assert "photo_x4_strip.png is there already" in refused(
        srflow, photo, f"out={tmp_path / 'out'}", "samples=2"
    )


# ---------------------------------------------------------------------- the strip


def test_the_panels_of_a_strip(srflow, rrdb, photo, tmp_path):
    out = tmp_path / "out"
    call(srflow, photo, f"out={out}", "samples=2")
    call(rrdb, photo, f"out={tmp_path / 'rrdb'}", "strip=false")
    strip = pixels_of(out / "photo_x4_strip.png")
    low_res = pixels_of(photo)
    first = pixels_of(out / "photo_x4_1.png")
    second = pixels_of(out / "photo_x4_2.png")
    values, top = comparison.spread_map(comparison.spread(torch.stack([first, second])))
    panels = [
        low_res.repeat_interleave(4, 1).repeat_interleave(4, 2),
        upscale(low_res[None], 4)[0],
        pixels_of(tmp_path / "rrdb" / "photo_x4_1.png"),
        first,
        second,
        values,
    ]
    column = (strip.shape[2] - comparison.GAP) // len(panels)
    assert (strip.shape[2] - comparison.GAP) % len(panels) == 0
    rows = slice(comparison.TITLE, comparison.TITLE + 52)
    for number, panel in enumerate(panels):
        left = comparison.GAP + number * column
        assert strip[:, rows, left : left + 88].equal(panel), number
    assert top > 1


def test_a_large_image_is_shown_where_it_differs_from_a_plain_one():
    plain = torch.full((3, 50, 70), 100, dtype=torch.uint8)
    image = plain.clone()
    image[:, 30:36, 41:47] = 200
    rows, columns = comparison.detail(image, plain, longest=6)
    assert (rows, columns) == (slice(30, 36), slice(41, 47))
    rows, columns = comparison.detail(image, plain, longest=60)
    assert (rows, columns.stop - columns.start) == (slice(0, 50), 60)
    assert comparison.detail(plain, plain, longest=100) == (slice(0, 50), slice(0, 70))


def test_spread_is_the_deviation_over_images():
    images = torch.tensor([10, 20, 60], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    assert comparison.spread(images).flatten().tolist() == pytest.approx([26.4575] * 4, abs=1e-3)
    picture, top = comparison.spread_map(torch.tensor([[0.0, 5.0, 10.0]]))
    assert top == pytest.approx(10, abs=0.1)
    assert picture[:, 0, 0].tolist() == list(comparison.COLOURS[0])
    assert picture[:, 0, 2].tolist() == list(comparison.COLOURS[-1])


def test_a_missing_rrdb_is_told(srflow, rrdb, photo, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(srflow, photo, f"out={tmp_path / 'out'}")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "no RRDB in the strip, since runs/rrdb, which the encoder began with, cannot be used "
        "here: give rrdb=MODEL"
    )
    assert lines[2].endswith(": low resolution, bicubic, sample 1, T=0.9")
    call(srflow, photo, f"rrdb={rrdb}", f"out={tmp_path / 'named'}")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith(": low resolution, bicubic, RRDB, sample 1, T=0.9")
    assert "no model elsewhere" in refused(
        srflow, photo, "rrdb=elsewhere", f"out={tmp_path / 'none'}"
    )


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "MODEL is missing: give MODEL IMAGE, and see --help"),
        (["SRFLOW"], "IMAGE is missing: give MODEL IMAGE, and see --help"),
        (["SRFLOW", "nowhere.png"], "there is no image nowhere.png"),
        (["nowhere/at/all", "PHOTO"], "no model nowhere/at/all"),
        (["SRFLOW", "PHOTO", "samples=0"], "samples=0 is out of range: give at least 1"),
        (["SRFLOW", "PHOTO", "temperature=-1"], "temperature=-1 is out of range: give a number"),
        (["SRFLOW", "PHOTO", "temperature=warm"], "temperature=warm is out of range"),
        (["SRFLOW", "PHOTO", "tile=100"], "tile=100 is less than twice overlap=96"),
        (["SRFLOW", "PHOTO", "sample=3"], "did you mean samples?"),
        (["SRFLOW", "PHOTO", "rrdb=SRFLOW"], "is of a flow: give a run of rrdb_..."),
        (["SRFLOW", "PHOTO", "device=gpu"], "device=gpu is not here: give"),
        (["SRFLOW", "PHOTO", "samples=1001"], "samples=1001 is out of range: give at most 1000"),
        (["SRFLOW", "PHOTO", "out=PHOTO/out"], "cannot be written"),
    ],
)
def test_mistakes_get_one_line(srflow, photo, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    places = {"SRFLOW": str(srflow), "PHOTO": str(photo)}
    for place, path in places.items():
        words = [word.replace(place, path) for word in words]
    assert message in refused(*words)


def test_images_that_cannot_be_used_get_one_line(srflow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.png").write_bytes(b"<html>")
    assert "bad.png is a web page" in refused(srflow, "bad.png")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    assert "has 16 bits a sample" in refused(srflow, "deep.png")
    save_image(tmp_path / "in" / "a.png")
    save_image(tmp_path / "in" / "a.jpg")
    assert "differ in their endings alone: rename one of them" in refused(srflow, "in")
    (tmp_path / "empty").mkdir()
    assert "contains no .png" in refused(srflow, "empty")


def test_other_models_are_refused(photo, tmp_path):
    line = refused("glow_cifar10/cpu-seed0", photo, f"out={tmp_path / 'out'}")
    assert line == (
        "glow_cifar10/cpu-seed0 is of glow_cifar10, which does not enlarge images: give a run of "
        "srflow_... or rrdb_..."
    )
    assert not (tmp_path / "out").exists()


def test_pixels_that_are_not_finite_are_magenta_and_told(srflow, photo, tmp_path, capsys):
    class Broken(FlowEnlarger):
        def tile(self, low_res, tile):
            images = super().tile(low_res, tile)
            images[:, 0, 3, 4] = torch.nan
            images[:, 1, 5, 6] = torch.inf
            return images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reproduce.enlargers.FlowEnlarger", Broken)
        call(srflow, photo, f"out={tmp_path / 'out'}")
    image = pixels_of(tmp_path / "out" / "photo_x4_1.png")
    assert image[:, 3, 4].tolist() == image[:, 5, 6].tolist() == [255, 0, 255]
    assert "only 99.9% of the pixels are finite, and the others magenta" in capsys.readouterr().out


def test_a_flow_without_an_inverse_gives_magenta_images(srflow, photo, tmp_path, capsys):
    def fail(*arguments):
        raise torch.linalg.LinAlgError("the matrix is singular")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SRFlow, "inverse", fail)
        call(srflow, photo, f"out={tmp_path / 'out'}", "strip=false")
    image = pixels_of(tmp_path / "out" / "photo_x4_1.png")
    assert image.eq(torch.tensor([255, 0, 255]).view(3, 1, 1)).all()
    assert "only 0.0% of the pixels are finite" in capsys.readouterr().out
