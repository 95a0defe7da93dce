"""Image files of any size: find them below a folder, and read one as an array of a given size."""

import contextlib
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # in any case
KINDS = "PNG, JPEG, WebP, BMP and TIFF"
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # Pillow's names of the KINDS
MODES = {1: "L", 3: "RGB"}  # Pillow's name of an image with so many channels
GREY_MODES = ("1", "L", "LA", "La")  # Pillow's names of images that are stored as grey levels
LONGEST_ASPECT = 4  # of a longer strip than so many crops the middle is kept (`read_strip`)
BITS_PER_SAMPLE = 258  # a tag of TIFF
HEADER = 32  # bytes that are enough for SIGNATURES and for the header of a PNG
PNG_DEPTH = 24  # the position of the byte with the bits of a sample
# What else may be in a file with the ending of an image: position, bytes, name.
SIGNATURES = (
    (0, b"GIF8", "a GIF"),
    (4, b"ftyp", "a HEIC, an AVIF or a video"),
    (0, b"<", "a web page or an SVG"),
    (0, b"%PDF", "a PDF"),
    (0, b"PK", "a zip archive"),
    (0, b"version https://git-lfs", "a Git LFS pointer: get the file with git lfs pull"),
)
A = TypeVar("A")


class UnreadableImage(ValueError):
    """A file is no image that can be used; the message is one line: the path and the reason."""


class Pixels(NamedTuple):
    """The pixels of a file.

    pixels: (C, H, W), uint8. is_transparent: whether pixels of the file were not opaque, and are
    now on white. is_enlarged: whether the file has fewer pixels than the crop along a side.
    """

    pixels: np.ndarray
    is_transparent: bool
    is_enlarged: bool


def find_images(root: Path) -> list[Path]:
    """The files below a folder that have an ending of ENDINGS, sorted by their path below it.

    The order is that of `normal` paths: it is the same for each of the forms in Unicode of a name
    with accents.

    Files and folders whose names begin with a dot are skipped. Links are followed, but not in
    circles. What is in the files is not looked at.

    Raises FileNotFoundError: there is no such folder. Raises ValueError: it is no folder, it or one
    of its folders must not be read, or there are no such files in it.
    """
    check_folder(root)
    images: list[Path] = []
    others: Counter[str] = Counter()
    for path in _files(root, ()):
        if path.suffix.lower() in ENDINGS:
            images.append(path)
        else:
            others[path.suffix.lower() or "without an ending"] += 1
    if not images:
        most_frequent = sorted(others, key=lambda ending: (-others[ending], ending))[:5]
        found = ", ".join(f"{others[ending]} {ending}" for ending in most_frequent)
        raise ValueError(
            f"{shown(root)} contains no {', '.join(ENDINGS)} (other files: {found or 'none'})"
        )
    names = {path: path.relative_to(root).as_posix() for path in images}
    return sorted(images, key=lambda path: (normal(names[path]), names[path]))


def check_folder(root: Path) -> None:
    """Raises FileNotFoundError or ValueError, as `find_images`: there is no folder to read."""
    try:
        mode = root.stat().st_mode
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no folder {shown(root)}") from error
    except OSError as error:
        raise ValueError(f"{shown(root)} cannot be read: {error.strerror}") from error
    if not stat.S_ISDIR(mode):
        raise ValueError(f"{shown(root)} is a file: give the folder that contains the images")


def _files(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """The files below a folder that are not hidden, also links that lead nowhere.

    above: device and number of the folders that have led here.
    """
    try:
        status = folder.stat()
        number = (status.st_dev, status.st_ino)
        with os.scandir(folder) as scan:
            entries = list(scan)
    except OSError as error:
        raise ValueError(f"{shown(folder)} cannot be read: {error.strerror}") from error
    if number in above:  # a link has led back
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = folder / entry.name
        if path.is_dir():
            yield from _files(path, (*above, number))
        else:
            yield path


def read_image(path: Path, channels: int, size: tuple[int, int]) -> np.ndarray:
    """The image in a file, resized and cropped: (channels, *size), uint8.

    The shorter side is resized to the crop, with antialiasing (Pillow's bicubic filter), and the
    middle of the longer side is taken. Before that the image is turned upright as its EXIF says,
    and transparent pixels are put on white. Colour profiles are not applied.

    channels: 1, the luma 0.299 R + 0.587 G + 0.114 B, or 3. size: (H, W), in pixels.

    Raises UnreadableImage: the file cannot be read or decoded, or is of a kind that is not
    supported, also one with more than 8 bits a sample or with several pictures.
    """
    return read_pixels(path, channels, size).pixels


def read_pixels(path: Path, channels: int, size: tuple[int, int]) -> Pixels:
    """The image that `read_image` returns, and what was done to it."""
    strip = read_strip(path, channels, size)
    return strip._replace(pixels=cut(strip.pixels, size))


def read_whole(path: Path, channels: int) -> np.ndarray:
    """All pixels of the image in a file, not resized: (channels, H, W), uint8.

    The rest is as in `read_image`; a grey image has equal channels. Raises UnreadableImage.
    """
    return read_whole_pixels(path, channels).pixels


def read_whole_pixels(path: Path, channels: int) -> Pixels:
    """The image that `read_whole` returns, and what was done to it."""
    image, is_transparent = _decode(path, channels)
    return Pixels(_channels_first(image), is_transparent, is_enlarged=False)


class Picture(NamedTuple):
    """All that an image file shows.

    pixels: (3, H, W), uint8, not mixed with any background. opacity: (1, H, W), uint8, from 0, not
    visible, to 255; None: all of it is visible. profile: the ICC colour profile, if the file has
    one.
    """

    pixels: np.ndarray
    opacity: np.ndarray | None
    profile: bytes | None


def read_picture(path: Path) -> Picture:
    """The image in a file, not resized and with its opacity; upright, as in `read_image`.

    Raises UnreadableImage, as `read_image`.
    """
    return _opened(path, _picture)


def _picture(image: Image.Image) -> Picture:
    """An image of Pillow as a Picture."""
    profile = image.info.get("icc_profile")
    if image.mode == "CMYK":  # whose profile is none of RGB
        profile = None
    opaque = _upright(image)
    opacity = None
    if opaque.has_transparency_data:
        if opaque.mode == "La":  # it has no way to RGBA
            opaque = opaque.convert("LA")
        opaque = opaque.convert("RGBA")
        opacity = _channels_first(opaque.getchannel("A"))
    return Picture(_channels_first(opaque.convert("RGB")), opacity, profile)


def _channels_first(image: Image.Image) -> np.ndarray:
    """The pixels of an image of Pillow, (C, H, W)."""
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1).copy()


def n_pixels(path: Path) -> int:
    """The number of pixels of the image in a file, by its header; 0 if it cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.width * image.height
    except Exception:  # of many classes; to decode the file tells why
        return 0


def has_grey_levels(path: Path) -> bool:
    """Whether a file that can be read stores grey levels; one in colour may look grey, too."""
    with Image.open(path, formats=FORMATS) as image:
        return image.mode in GREY_MODES


def read_strip(path: Path, channels: int, size: tuple[int, int]) -> Pixels:
    """As `read_pixels`, with all of the longer side: (channels, H, W), with H or W as in `size`.

    At most LONGEST_ASPECT times the side of the crop are kept, from the middle.
    """
    image, is_transparent = _decode(path, channels, size)
    scale = max(size[0] / image.height, size[1] / image.width)
    height = min(max(round(image.height * scale), size[0]), LONGEST_ASPECT * size[0])
    width = min(max(round(image.width * scale), size[1]), LONGEST_ASPECT * size[1])
    pixels = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    return Pixels(pixels.transpose(2, 0, 1).copy(), is_transparent, is_enlarged=scale > 1)


def cut(strip: np.ndarray, size: tuple[int, int], place: float = 0.5) -> np.ndarray:
    """The crop of a strip, (C, H, W), of `size` = (H, W).

    place: where it is along the strip: 0 at the left or at the top, 1 at the other end, and 0.5 in
    the middle.

    >>> cut(np.arange(8).reshape(1, 1, 8), size=(1, 4)).tolist()
    [[[2, 3, 4, 5]]]
    """
    height = size[0]
    width = size[1]
    top = _start(strip.shape[1] - height, place)
    left = _start(strip.shape[2] - width, place)
    return strip[:, top : top + height, left : left + width]


def _start(n_beyond: int, place: float) -> int:
    """The first of the n_beyond + 1 positions of a crop at place 0, and so on to the last at 1."""
    return min(int(place * (n_beyond + 1)), n_beyond)


def _decode(
    path: Path, channels: int, size: tuple[int, int] | None = None
) -> tuple[Image.Image, bool]:
    """The image in a file, upright and opaque, and whether it was not opaque.

    It has at least twice the pixels of `size`, if the file has them: of a large JPEG fewer pixels
    than it has are decoded. Without a size all of them are.
    """
    return _opened(path, lambda image: _opaque(_upright(image), MODES[channels]), size)


def _opened(path: Path, use: Callable[[Image.Image], A], size: tuple[int, int] | None = None) -> A:
    """What `use` makes of the image in a file, while the file is open.

    size: as in `_decode`. Raises UnreadableImage, as `read_image`.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnreadableImage(f"{shown(path)} is no regular file")
        with path.open("rb") as file:
            header = file.read(HEADER)
            with Image.open(file, formats=FORMATS) as image:
                _check(path, image, header)
                if size is not None:
                    image.draft(None, (2 * max(size), 2 * max(size)))
                image.load()
                return use(image)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"{shown(path)} {_content(path)}") from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UnreadableImage(f"{shown(path)} has more than {most:,} pixels") from error
    except Exception as error:  # Pillow raises errors of many classes for damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(
            f"{shown(path)} cannot be read: {' '.join(reason.split())}"
        ) from error


def _check(path: Path, image: ImageFile.ImageFile, header: bytes) -> None:
    """Raises UnreadableImage: an image has too many bits a sample, or is not a single picture.

    header: the first bytes of the file.
    """
    n_bits = _bits(image, header)
    if n_bits > 8:
        raise UnreadableImage(
            f"{shown(path)} has {n_bits} bits a sample: convert it to 8 bits, or take it away"
        )
    # A photograph in the format MPO is a JPEG that is followed by a preview or a map of brightness.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        n_frames = getattr(image, "n_frames", 2)
        raise UnreadableImage(
            f"{shown(path)} contains {n_frames} pictures (an animation, or pages): "
            "save them as single files, or take it away"
        )


def _bits(image: ImageFile.ImageFile, header: bytes) -> int:
    """The bits of a sample. Pillow itself would drop those of a 16-bit colour image to 8."""
    if image.format == "PNG":
        return header[PNG_DEPTH]
    if image.format == "TIFF":
        tags = vars(image)["tag_v2"]
        return max(tags.get(BITS_PER_SAMPLE, (1,)))
    return 8


def _content(path: Path) -> str:
    """What is in a file that is no image, as the end of a sentence."""
    header = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        header = file.read(HEADER)
    if not header:
        return "is empty"
    for start, signature, name in SIGNATURES:
        if header[start:].startswith(signature):
            return f"is {name}, and not one of {KINDS}"
    return f"is damaged at its beginning, or not one of {KINDS}"


def _upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF or XMP says; as it is, where they are damaged."""
    with contextlib.suppress(Exception):  # of many classes, as for damaged images
        image.getexif()  # the image keeps what could be read
    # Pillow would write them again without the orientation, and not every camera's can be written.
    for key in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):
        image.info.pop(key, None)
    return ImageOps.exif_transpose(image)


def _opaque(image: Image.Image, mode: str) -> tuple[Image.Image, bool]:
    """An image in a mode of MODES, with transparent pixels on white, and whether it had any."""
    if not image.has_transparency_data:
        if image.mode == "P":  # the palette may be in colour
            image = image.convert("RGB")
        return image.convert(mode), False
    if image.mode == "La":  # it has no way to RGBA
        image = image.convert("LA")
    image = image.convert("RGBA")
    is_transparent = bool(np.asarray(image.getchannel("A")).min() < 255)
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert(mode), is_transparent


def normal(name: str) -> str:
    """The composed form of a name in Unicode, which has one character for an accented letter."""
    return unicodedata.normalize("NFC", name)


def shown(path: Path) -> str:
    """A path as one printable line, also if its name has line breaks or is no UTF-8.

    >>> shown(Path("a\\nb.png"))
    'a b.png'
    """
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return " ".join(text.split()) if "\n" in text or "\r" in text else text
