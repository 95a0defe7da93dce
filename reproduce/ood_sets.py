"""Sets of images that a model was not trained on, in the size of the model's own images.

Each set is optional: where its files are missing, `Missing` says what to put where.
"""

import hashlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from datamodules.checks import expand_home
from datamodules.cifar10 import FOLDER as CIFAR10_FOLDER
from datamodules.cifar10 import TEST_MD5
from datamodules.image_files import MODES, UnreadableImage, find_images, read_image, read_whole
from datamodules.mnist import FETCHES, MNIST, FashionMNIST, damaged, read_idx

SVHN_FILE = "test_32x32.mat"
SVHN_MD5 = "eb5a983be6a315427106f1b164d9cef3"
SVHN_URL = "http://ufldl.stanford.edu/housenumbers/test_32x32.mat"
CIFAR100_FOLDER = "cifar-100-python"
CIFAR100_MD5 = "f0ef6b0ae62326f3e7ffdfab6717acfc"  # of its file `test`
CIFAR100_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
BSDS_FOLDER = "BSDS500"
IDX_FILE = "t10k-images-idx3-ubyte"
LEAST = 2  # images of a set, for an interval
PADDED = 4  # pixels by which digits may be smaller than the model's images, to be padded


class Missing(ValueError):
    """A set is not here. The message is one line: what to do, for a sentence of its own."""


class ImageSet(NamedTuple):
    """Images of a size.

    name: as in `SETS`. title: for a reader. preparation: what was done to the images, in words.
    images: (N, C, H, W), uint8, in a random order. n_unreadable: files that could not be read.
    """

    name: str
    title: str
    preparation: str
    images: np.ndarray
    n_unreadable: int = 0


class Request(NamedTuple):
    """What a set has to be like, and where to look for its files.

    shape: (C, H, W). n: the most images. seed: of the choice of images, and of images that are
    made. root: the folder of the official files. bsds, folder: folders, or empty.
    """

    shape: tuple[int, int, int]
    n: int
    seed: int
    root: Path
    bsds: str = ""
    folder: str = ""

    def random(self, name: str) -> np.random.Generator:
        """The random numbers of a set, which do not depend on other sets."""
        return np.random.default_rng([self.seed, *name.encode()])


def chosen(total: int, request: Request, name: str) -> np.ndarray:
    """Numbers of at most `request.n` of some images, in a random order."""
    return request.random(name).permutation(total)[: request.n]


def fitted(
    images: np.ndarray, shape: tuple[int, int, int], pads: bool = False
) -> tuple[np.ndarray, str]:
    """Images as (N, *shape), uint8, and what was done to them, in words.

    Grey is repeated in three channels, and colour becomes luma. Images of another size are resized
    with Pillow's bicubic filter, after the middle was cut out if they have another aspect.

    images: (N, C, H, W), uint8. pads: whether images that are smaller by at most PADDED pixels get
    a black frame instead, as digits do, whose own ground is black.
    """
    channels = shape[0]
    size = shape[1:]
    words = []
    if images.shape[1] < channels:
        images = images.repeat(channels, axis=1)
        words.append("grey repeated in three channels")
    missing = (size[0] - images.shape[2], size[1] - images.shape[3])
    if pads and all(0 <= side <= PADDED for side in missing) and any(missing):
        frame = [(side // 2, side - side // 2) for side in missing]
        words.append(f"a black frame around {images.shape[2]}x{images.shape[3]} pixels")
        images = np.pad(images, [(0, 0), (0, 0), *frame])
    is_other_size = images.shape[2:] != size
    if is_other_size or images.shape[1] > channels:
        if is_other_size:
            words.append(f"resized from {images.shape[2]}x{images.shape[3]} (bicubic)")
        if images.shape[1] > channels:
            words.append("as luma")
        images = np.stack([_resized(image, channels, size) for image in images])
    return images, ", ".join(words) or "as they are"


def _resized(image: np.ndarray, channels: int, size: tuple[int, int]) -> np.ndarray:
    array = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    picture = Image.fromarray(array).convert(MODES[channels])
    fit = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.BICUBIC)
    return as_channels_first(np.asarray(fit))


def as_channels_first(pixels: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) as (C, H, W)."""
    if pixels.ndim == 2:
        return pixels[None]
    return pixels.transpose(2, 0, 1)


# ---------------------------------------------------------------------- official files


def checked(path: Path, md5: str) -> bytes:
    """The content of an official file. ValueError, one line: it is another file."""
    content = path.read_bytes()
    if hashlib.md5(content).hexdigest() != md5:
        raise damaged(path, f"its content does not have the official md5 {md5}")
    return content


def first_file(root: Path, names: Sequence[str], advice: str) -> Path:
    """The first of some files below a folder. Missing: there is none; `advice` is its message."""
    for name in names:
        if (root / name).is_file():
            return root / name
    raise Missing(advice)


def svhn(request: Request) -> ImageSet:
    """The 26,032 test images of SVHN (Netzer et al. 2011), cropped house numbers."""
    from scipy.io import loadmat

    names = [f"{folder}{SVHN_FILE}" for folder in ("", "SVHN/", "svhn/")]
    advice = f"put {SVHN_FILE} ({SVHN_URL}) into {request.root}/"
    path = first_file(request.root, names, advice)
    checked(path, SVHN_MD5)
    images = loadmat(path)["X"].transpose(3, 2, 0, 1)
    return _official("svhn", "SVHN test", images, request)


def cifar100(request: Request) -> ImageSet:
    """The 10,000 test images of CIFAR-100 (Krizhevsky 2009)."""
    advice = f"unpack cifar-100-python.tar.gz ({CIFAR100_URL}) in {request.root}/"
    path = first_file(request.root, [f"{CIFAR100_FOLDER}/test"], advice)
    return _official("cifar100", "CIFAR-100 test", _of_pickle(path, CIFAR100_MD5), request)


def cifar10(request: Request) -> ImageSet:
    """The 10,000 test images of CIFAR-10 (Krizhevsky 2009)."""
    [(name, md5)] = TEST_MD5.items()
    advice = f"unpack cifar-10-python.tar.gz in {request.root}/"
    path = first_file(request.root, [f"{CIFAR10_FOLDER}/{name}"], advice)
    return _official("cifar10", "CIFAR-10 test", _of_pickle(path, md5), request)


def _of_pickle(path: Path, md5: str) -> np.ndarray:
    """The images of a pickle, (N, 3, 32, 32) uint8.

    The md5 is checked first, since unpickling other content could run arbitrary code.
    """
    batch = pickle.loads(checked(path, md5), encoding="bytes")
    return batch[b"data"].reshape(-1, 3, 32, 32)


def mnist(request: Request) -> ImageSet:
    """The 10,000 test images of MNIST (LeCun et al. 1998)."""
    return _of_idx("mnist", MNIST, request)


def fashion_mnist(request: Request) -> ImageSet:
    """The 10,000 test images of Fashion-MNIST (Xiao et al. 2017)."""
    return _of_idx("fashion_mnist", FashionMNIST, request)


def _of_idx(name: str, kind: type[MNIST], request: Request) -> ImageSet:
    names = [f"{folder}/{IDX_FILE}{end}" for folder in kind.folders for end in ("", ".gz")]
    advice = f"put {IDX_FILE}.gz ({kind.url}) into {request.root / kind.folders[0]}/"
    path = first_file(request.root, names, advice)
    images = read_idx(path, kind.md5[IDX_FILE])[:, None]
    return _official(name, f"{kind.title} test", images, request, pads=True)


def _official(
    name: str, title: str, images: np.ndarray, request: Request, pads: bool = False
) -> ImageSet:
    """Some of the images of an official file, (N, C, H, W), in the size of the request."""
    some = images[chosen(len(images), request, name)]
    pixels, preparation = fitted(some, request.shape, pads)
    return ImageSet(name, title, preparation, pixels)


# ---------------------------------------------------------------------- folders


def bsds(request: Request) -> ImageSet:
    """Crops of the photographs of BSDS500 (Arbelaez et al. 2011), which are not resized.

    Each photograph gives as many, at places of a grid that are chosen at random.
    """
    folder = request.root / BSDS_FOLDER
    if request.bsds:
        folder = expand_home("bsds", request.bsds)
    elif not folder.is_dir():
        raise Missing(f"put the folder {BSDS_FOLDER} into {request.root}/, or give bsds=FOLDER")
    paths = find_images(folder)
    random = request.random("bsds")
    each = -(-request.n // len(paths))
    crops: list[np.ndarray] = []
    n_unreadable = 0
    for path in paths:
        try:
            crops += _crops(path, request.shape, each, random)
        except UnreadableImage:
            n_unreadable += 1
    if not crops:
        raise ValueError(f"no photograph in {folder} can be read, or is as large as the images")
    some = np.stack(crops)[chosen(len(crops), request, "bsds")]
    preparation = f"crops of {len(paths) - n_unreadable} photographs, not resized"
    return ImageSet("bsds", "crops of BSDS500", preparation, some, n_unreadable)


def _crops(
    path: Path, shape: tuple[int, int, int], n: int, random: np.random.Generator
) -> Iterator[np.ndarray]:
    """At most n crops of a photograph, (C, H, W), which do not overlap."""
    channels, height, width = shape
    photograph = read_whole(path, channels)
    rows = photograph.shape[1] // height
    columns = photograph.shape[2] // width
    for place in random.permutation(rows * columns)[:n]:
        top = height * (place // columns)
        left = width * (place % columns)
        yield photograph[:, top : top + height, left : left + width]


def own_folder(request: Request) -> ImageSet:
    """Image files of a user, resized and cropped as `reproduce.score` does it."""
    if not request.folder:
        raise Missing("give folder=FOLDER, a folder of images")
    folder = expand_home("folder", request.folder)
    paths = find_images(folder)
    images: list[np.ndarray] = []
    n_unreadable = 0
    for number in chosen(len(paths), request, "folder"):
        try:
            images.append(read_image(paths[number], request.shape[0], request.shape[1:]))
        except UnreadableImage:
            n_unreadable += 1
    if not images:
        raise ValueError(f"none of {n_unreadable} files in {folder} can be read")
    preparation = "resized so that the shorter side fits (bicubic), the middle of the longer one"
    return ImageSet("folder", folder.resolve().name, preparation, np.stack(images), n_unreadable)


# ---------------------------------------------------------------------- images that are made


def constant(request: Request) -> ImageSet:
    """Images of one colour, all of them equally likely. Of grey ones there are 256."""
    channels = request.shape[0]
    random = request.random("constant")
    if channels == 1:
        colors = random.permutation(256)[: request.n, None]
    else:
        colors = random.integers(0, 256, (request.n, channels))
    images = np.empty((len(colors), *request.shape), np.uint8)
    images[:] = colors[:, :, None, None]
    return ImageSet("constant", "images of one colour", "made, each colour as likely", images)


def noise(request: Request) -> ImageSet:
    """Images of which every number is drawn from 0 to 255, all of them equally likely."""
    images = request.random("noise").integers(0, 256, (request.n, *request.shape), np.uint8)
    return ImageSet("noise", "uniform noise", "made, each of the 256 values as likely", images)


SETS: dict[str, Callable[[Request], ImageSet]] = {
    "svhn": svhn,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "bsds": bsds,
    "constant": constant,
    "noise": noise,
    "folder": own_folder,
}


def read_sets(
    names: Sequence[str], request: Request, own: str
) -> tuple[list[ImageSet], dict[str, str]]:
    """The sets that are here, and for each of the others what to do, by its name.

    own: the name of the data that the model was trained on, which are no other data.
    FileNotFoundError or ValueError, one line: a folder is not there, or a file is damaged.
    """
    sets: list[ImageSet] = []
    left_out: dict[str, str] = {}
    for name in names:
        if name == own:
            left_out[name] = "these are the model's own data"
            continue
        try:
            other = SETS[name](request)
        except Missing as missing:
            left_out[name] = str(missing)
            continue
        except ValueError as error:  # data.download= is for the model's own data
            raise ValueError(str(error).removesuffix(FETCHES)) from error
        if len(other.images) < LEAST:
            left_out[name] = f"it has {len(other.images)} images, and {LEAST} are needed"
            continue
        sets.append(other)
    return sets, left_out
