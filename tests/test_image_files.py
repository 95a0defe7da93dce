"""Image files of any size and kind, also those that a stranger's folder should not contain."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.image_files import (
    ENDINGS,
    UnreadableImage,
    find_images,
    read_image,
    read_pixels,
    read_strip,
    shown,
)

KINDS = "PNG, JPEG, WebP, BMP and TIFF"


def noise(height=12, width=16, seed=0):
    """A colour image of random pixels."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def channels_first(image):
    return np.asarray(image).transpose(2, 0, 1)


def refused(path, channels=3, size=(8, 8)):
    """The message about a file, without the path at its beginning."""
    with pytest.raises(UnreadableImage) as error:
        read_image(path, channels, size)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{path} ")
    return message.removeprefix(f"{path} ")


# Finding files


def make_files(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def found(root):
    return [path.relative_to(root).as_posix() for path in find_images(root)]


def test_images_are_found_in_all_folders_in_the_order_of_their_names(tmp_path):
    make_files(tmp_path, "b.png", "a/ü ber.JPG", "a/b/c/1.TIFF", "a.webp", "notes.txt", "x.png.bak")
    assert found(tmp_path) == ["a.webp", "a/b/c/1.TIFF", "a/ü ber.JPG", "b.png"]


def test_every_ending_is_found(tmp_path):
    make_files(tmp_path, *(f"a{ending}" for ending in ENDINGS))
    assert len(found(tmp_path)) == len(ENDINGS) == 7


def test_hidden_files_are_skipped(tmp_path):
    root = tmp_path / ".hidden"  # the folder itself may be hidden
    make_files(root, "a.png", "._a.png", ".thumbs/a.png", "b/.c.png")
    assert found(root) == ["a.png"]


def test_a_folder_may_have_the_name_of_an_image(tmp_path):
    make_files(tmp_path, "holiday.jpg/a.png")
    assert found(tmp_path) == ["holiday.jpg/a.png"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = tmp_path / "images"
    make_files(root, "a/1.png")
    make_files(tmp_path, "elsewhere/2.png")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "up").symlink_to(root)
    (root / "c.png").symlink_to(root / "a" / "1.png")
    (root / "gone.png").symlink_to(root / "nothing")
    assert found(root) == ["a/1.png", "b/2.png", "c.png", "gone.png"]
    assert refused(root / "gone.png") == "cannot be read: No such file or directory"


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^there is no folder .*/nowhere$"):
        find_images(tmp_path / "nowhere")


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path):
    make_files(tmp_path, "a.png")
    with pytest.raises(ValueError, match=r"a\.png is a file: give the folder that contains"):
        find_images(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png/b cannot be read: Not a directory$"):
        find_images(tmp_path / "a.png" / "b")


def test_a_folder_without_images_says_what_is_in_it(tmp_path):
    with pytest.raises(ValueError, match=r"contains no \.png, .*\.tiff \(other files: none\)$"):
        find_images(tmp_path)
    make_files(tmp_path, "1.heic", "2.HEIC", "3.gif", "README")
    with pytest.raises(
        ValueError, match=r"\(other files: 2 \.heic, 1 \.gif, 1 without an ending\)$"
    ):
        find_images(tmp_path)


def test_a_folder_that_must_not_be_read_is_one_line(tmp_path, monkeypatch):
    make_files(tmp_path, "a.png", "secret/b.png")
    scandir = os.scandir

    def refuse(folder):  # chmod does not keep root out
        if Path(folder).name == "secret":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"/secret cannot be read: Permission denied$"):
        find_images(tmp_path)


# What arrives


@pytest.mark.parametrize("ending", [".png", ".webp", ".bmp", ".tif"])
def test_pixels_of_a_file_of_the_right_size_are_unchanged(tmp_path, ending):
    image = noise(12, 16)
    image.save(tmp_path / f"a{ending}", **({"lossless": True} if ending == ".webp" else {}))
    pixels = read_image(tmp_path / f"a{ending}", 3, (12, 16))
    assert pixels.dtype == np.uint8
    assert pixels.tolist() == channels_first(image).tolist()
    grey = read_image(tmp_path / f"a{ending}", 1, (12, 16))
    assert grey.tolist() == [np.asarray(image.convert("L")).tolist()]


def test_a_jpeg_is_nearly_its_original(tmp_path):
    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    image.save(tmp_path / "a.jpg", quality=95)
    difference = read_image(tmp_path / "a.jpg", 3, (64, 64)) - channels_first(image).astype(int)
    assert abs(difference).max() <= 2


def test_a_grey_file_gets_three_equal_channels(tmp_path):
    image = noise().convert("L")
    image.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 3, (12, 16)).tolist() == [np.asarray(image).tolist()] * 3


def test_the_middle_of_the_longer_side_is_taken(tmp_path):
    columns = np.repeat(np.arange(12, dtype=np.uint8)[None] * 20, 4, axis=0)
    Image.fromarray(columns).save(tmp_path / "wide.png")
    Image.fromarray(columns.T.copy()).save(tmp_path / "tall.png")
    wide = read_image(tmp_path / "wide.png", 1, (4, 4))
    assert wide[0, 0].tolist() == [80, 100, 120, 140]
    assert read_image(tmp_path / "tall.png", 1, (4, 4))[0, :, 0].tolist() == [80, 100, 120, 140]


def test_shrinking_is_antialiased(tmp_path):
    """Without antialiasing every second column of a fine pattern would be taken: 0 or 255."""
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    middle = read_image(tmp_path / "a.png", 1, (16, 16))[0, 4:-4, 4:-4]
    assert 126 <= middle.min() <= middle.max() <= 129


def test_a_large_jpeg_is_shrunk_as_a_png(tmp_path):
    """Only some of its pixels are decoded, which must not move or sharpen the picture."""
    y, x = np.mgrid[:480, :640] / 480
    levels = 127 + 60 * np.sin(9 * x) + 60 * np.cos(7 * y)
    image = Image.fromarray(levels.astype(np.uint8))
    image.save(tmp_path / "a.jpg", quality=98)
    image.save(tmp_path / "a.png")
    jpeg = read_image(tmp_path / "a.jpg", 1, (24, 32)).astype(int)
    assert abs(jpeg - read_image(tmp_path / "a.png", 1, (24, 32))).max() <= 2


@pytest.mark.parametrize(("height", "width"), [(1, 50), (50, 1), (1, 1), (3, 3)])
def test_a_narrow_image_is_enlarged(tmp_path, height, width):
    Image.new("RGB", (width, height), (10, 20, 30)).save(tmp_path / "a.png")
    read = read_pixels(tmp_path / "a.png", 3, (4, 6))
    assert read.is_enlarged
    assert read.pixels.tolist() == [[[level] * 6] * 4 for level in (10, 20, 30)]


def test_a_strip_has_all_of_the_longer_side(tmp_path):
    columns = np.repeat(np.arange(12, dtype=np.uint8)[None] * 20, 4, axis=0)
    Image.fromarray(columns).save(tmp_path / "wide.png")
    Image.fromarray(columns.T.copy()).save(tmp_path / "tall.png")
    assert read_strip(tmp_path / "wide.png", 1, (4, 4)).pixels.tolist() == [columns.tolist()]
    assert read_strip(tmp_path / "tall.png", 1, (4, 4)).pixels.tolist() == [columns.T.tolist()]
    assert read_strip(tmp_path / "wide.png", 1, (8, 8)).pixels.shape == (1, 8, 24)


def test_a_strip_is_at_most_four_crops_long(tmp_path):
    columns = np.repeat(np.arange(100, dtype=np.uint8)[None], 2, axis=0)
    Image.fromarray(columns).save(tmp_path / "a.png")
    strip = read_strip(tmp_path / "a.png", 1, (2, 2)).pixels
    assert strip[0, 0].tolist() == list(range(46, 54))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", [".png", ".tif", ".webp"])
def test_images_are_turned_upright(tmp_path, ending, orientation):
    upright = noise(12, 16)
    # How each orientation is stored: the value of EXIF says what a viewer has to undo.
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {
        ".png": {"exif": exif},
        ".tif": {"tiffinfo": {0x0112: orientation}},
        ".webp": {"exif": exif, "lossless": True},
    }
    path = tmp_path / f"a{ending}"
    stored.save(path, **options[ending])
    assert read_image(path, 3, (12, 16)).tolist() == channels_first(upright).tolist()


def test_a_photograph_of_a_phone_held_upright(tmp_path):
    """Orientation 6, in a JPEG: the left half as stored is the upper half."""
    stored = np.zeros((16, 32), np.uint8)
    stored[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif)
    pixels = read_image(tmp_path / "a.jpg", 1, (32, 16))[0]
    assert pixels[:16].min() > 250
    assert pixels[16:].max() < 5


def test_an_orientation_counts_where_the_rest_of_exif_cannot_be_written(tmp_path):
    upright = noise(12, 16)
    # Big-endian TIFF with two entries: the orientation, and a resolution that is a text.
    entries = struct.pack(">HHIHHHHI4s", 0x0112, 3, 1, 6, 0, 0x011A, 2, 2, b"a")
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + entries + b"\0\0\0\0"
    path = tmp_path / "a.png"
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    assert read_image(path, 3, (12, 16)).tolist() == channels_first(upright).tolist()


def test_damaged_exif_leaves_the_image_as_it_is(tmp_path):
    image = noise()
    image.save(tmp_path / "a.png", exif=b"Exif\0\0no TIFF header at all")
    assert read_image(tmp_path / "a.png", 3, (12, 16)).tolist() == channels_first(image).tolist()


def half_transparent(mode):
    """Black, and transparent in its left half."""
    image = Image.new(mode, (4, 4), (0,) * len(mode))
    image.paste((0,) * (len(mode) - 1) + (255,), (2, 0, 4, 4))
    return image


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "levels of a palette", "grey", "colour"])
def test_transparent_pixels_are_white(tmp_path, kind):
    path = tmp_path / "a.png"
    numbers = np.zeros((4, 4), np.uint8)
    numbers[:, 2:] = 1
    if kind in ("RGBA", "LA"):
        half_transparent(kind).save(path)
    elif kind.endswith("palette"):
        image = Image.fromarray(numbers).convert("P")
        image.putpalette([90, 0, 0, 0, 0, 0])
        image.save(path, transparency=0 if kind == "palette" else b"\0\xff")
    elif kind == "grey":
        Image.fromarray(90 * (1 - numbers)).save(path, transparency=90)
    else:
        colours = np.zeros((4, 4, 3), np.uint8)
        colours[:, :2] = (90, 1, 2)
        Image.fromarray(colours).save(path, transparency=(90, 1, 2))
    for channels in (1, 3):
        read = read_pixels(path, channels, (4, 4))
        assert read.is_transparent
        assert read.pixels.tolist() == [[[255, 255, 0, 0]] * 4] * channels


def test_half_opaque_is_half_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "a.webp", lossless=True)
    pixels = read_image(tmp_path / "a.webp", 3, (2, 2))
    assert pixels[:, 0, 0].tolist() == [255, 127, 127]


def test_an_alpha_channel_that_is_opaque_is_not_transparent(tmp_path):
    image = noise()
    image.convert("RGBA").save(tmp_path / "a.png")
    read = read_pixels(tmp_path / "a.png", 3, (12, 16))
    assert read.pixels.tolist() == channels_first(image).tolist()
    assert not read.is_transparent
    assert not read.is_enlarged


def test_a_palette_has_its_colours_also_in_grey(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 250, 100, 0])
    image.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 3, (4, 4))[:, 0, 0].tolist() == [250, 100, 0]
    assert read_image(tmp_path / "a.png", 1, (4, 4))[:, 0, 0].tolist() == [133]


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_becomes_rgb(tmp_path, name):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / name)  # red
    pixels = read_image(tmp_path / name, 3, (8, 8))
    assert pixels[0].min() > 250
    assert pixels[1:].max() < 5


def test_one_bit_is_black_and_white(tmp_path):
    numbers = np.eye(8, dtype=bool)
    Image.fromarray(numbers).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 1, (8, 8)).tolist() == [(255 * numbers).tolist()]


def test_a_jpeg_with_a_preview_behind_it_is_a_photograph(tmp_path):
    """Phones add a map of brightness or a preview (the format MPO), which is no animation."""
    path = tmp_path / "a.jpg"
    Image.new("L", (8, 8), 40).save(
        path, format="MPO", save_all=True, append_images=[Image.new("L", (8, 8), 200)]
    )
    assert read_image(path, 1, (8, 8)).tolist() == [[[40] * 8] * 8]


def test_the_content_decides_and_not_the_ending(tmp_path):
    image = noise()
    image.save(tmp_path / "a.jpg", format="PNG")
    assert read_image(tmp_path / "a.jpg", 3, (12, 16)).tolist() == channels_first(image).tolist()


def test_names_with_blanks_and_umlauts(tmp_path):
    path = tmp_path / "Bär & Söhne" / "mein  Bild (1)%.png"
    path.parent.mkdir()
    Image.new("L", (4, 4), 7).save(path)
    assert [read_image(p, 1, (2, 2)).max() for p in find_images(tmp_path)] == [7]


def test_a_name_that_no_terminal_shows_is_one_line(tmp_path):
    assert shown(Path("a\nb\r.png")) == "a b .png"
    assert shown(Path(os.fsdecode(b"caf\xe9.png"))) == "caf\\xe9.png"
    path = tmp_path / "a\nb.png"
    path.write_bytes(b"")
    with pytest.raises(UnreadableImage) as error:
        read_image(path, 1, (2, 2))
    assert str(error.value) == f"{tmp_path}/a b.png is empty"


# Files that are refused


def png_of(width, height):
    """The bytes of a PNG of a given size, almost without data."""

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (bytes(1000), f"is damaged at its beginning, or not one of {KINDS}"),
        (b"no image", f"is damaged at its beginning, or not one of {KINDS}"),
        (b"GIF89a\1\0\1\0\0\0\0;", f"is a GIF, and not one of {KINDS}"),
        (b"\0\0\0\x18ftypheic", f"is a HEIC, an AVIF or a video, and not one of {KINDS}"),
        (b"<!DOCTYPE html>", f"is a web page or an SVG, and not one of {KINDS}"),
        (b"%PDF-1.7", f"is a PDF, and not one of {KINDS}"),
    ],
)
def test_a_file_that_is_no_image_says_what_it_is(tmp_path, content, message):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert refused(path) == message


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".bmp", ".tif"])
def test_a_file_that_is_cut_off_is_refused(tmp_path, ending):
    whole = tmp_path / f"whole{ending}"
    noise(40, 40).save(whole)
    content = whole.read_bytes()
    path = tmp_path / f"a{ending}"
    for length in (1, 9, 20, 50, len(content) // 2, len(content) * 9 // 10):
        path.write_bytes(content[:length])
        assert refused(path)


@pytest.mark.parametrize("position", [200, 800])
def test_a_png_with_a_flipped_byte_is_refused(tmp_path, position):
    path = tmp_path / "a.png"
    noise(40, 40).save(path)
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)
    assert refused(path).startswith("cannot be read: ")


@pytest.mark.parametrize(
    ("name", "array", "n_bits"),
    [
        ("grey.png", np.full((9, 9), 300, np.uint16), 16),
        ("grey.tif", np.full((9, 9), 300, np.uint16), 16),
        ("whole.tif", np.full((9, 9), 300, np.int32), 32),
        ("real.tif", np.full((9, 9), 0.5, np.float32), 32),
    ],
)
def test_more_than_eight_bits_are_refused(tmp_path, name, array, n_bits):
    Image.fromarray(array).save(tmp_path / name)
    message = f"has {n_bits} bits a sample: convert it to 8 bits, or take it away"
    assert refused(tmp_path / name) == message


def test_a_colour_png_of_sixteen_bits_is_refused(tmp_path):
    """Pillow cannot write one, and reads it as one of 8 bits."""
    path = tmp_path / "a.png"
    content = bytearray(png_of(4, 4))
    content[24] = 16
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    with Image.open(path) as image:
        assert image.mode == "RGB"
    assert refused(path).startswith("has 16 bits a sample")


@pytest.mark.parametrize("ending", [".png", ".webp", ".tif"])
def test_several_pictures_in_a_file_are_refused(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    noise().save(path, save_all=True, append_images=[noise(seed=1), noise(seed=2)])
    assert refused(path).startswith("contains 3 pictures (an animation, or pages)")


def test_an_animated_gif_is_refused_by_its_content(tmp_path):
    path = tmp_path / "a.png"
    noise().save(path, format="GIF", save_all=True, append_images=[noise(seed=1)])
    assert refused(path) == f"is a GIF, and not one of {KINDS}"


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_of(50_000, 50_000))
    assert refused(path) == "has more than 178,956,970 pixels"


def test_what_is_no_regular_file_is_refused(tmp_path):
    """A pipe without a writer would be waited for for ever."""
    os.mkfifo(tmp_path / "a.png")
    assert found(tmp_path) == ["a.png"]
    assert refused(tmp_path / "a.png") == "is no regular file"
    (tmp_path / "b.png").symlink_to(tmp_path / "b.png")
    assert refused(tmp_path / "b.png") == "cannot be read: Too many levels of symbolic links"


def test_a_file_that_must_not_be_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    noise().save(path)

    def refuse(self, *arguments):  # chmod does not keep root out
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert refused(path) == "cannot be read: Permission denied"
