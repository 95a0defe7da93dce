"""A folder of image files of any size: PNG, JPEG, WebP, BMP, TIFF."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from datamodules.checks import SharedError, check_count, expand_home
from datamodules.dequantization import UniformDequantizer
from datamodules.image_cache import (
    Decoded,
    Files,
    Images,
    Reading,
    content_hash,
    decoded,
    default_cache,
    digests,
)
from datamodules.image_files import check_folder, cut, find_images, normal, shown
from datamodules.images import ImageArray
from datamodules.samplers import check_batch_size
from datamodules.stateless import StatelessDataModule

SPLITS = ("train", "val", "test")  # and the names of their subfolders
# The part of the images that is held out for a split without a subfolder, by the hash of a name.
HELD_OUT = {"test": (0.0, 0.05), "val": (0.05, 0.1)}
CHANNELS = (1, 3)
LARGEST_SIZE = 4096  # pixels
ANOTHER_ROOT = "give the folder that contains the images as data.root"
MOST_NAMED = 10  # files that are named one by one, if they cannot be read


class File(NamedTuple):
    """An image file.

    name: its path below the folder of all images, with /. inner: its path below the folder of its
    split, or the name if the split has no folder.
    """

    path: Path
    name: str
    inner: str
    split: str


class Content(NamedTuple):
    """What is in a folder: the files that can be read, with their images in the same order.

    sha256: the content of all files. unreadable: the path of each other file, with the reason.
    unused: the names of images that are in no split.
    """

    files: list[File]
    decoded: Decoded
    sha256: str
    unreadable: dict[str, str]
    unused: list[str]

    def part(self, split: str) -> list[int]:
        """The numbers of the images of a split."""
        return [k for k, file in enumerate(self.files) if file.split == split]


class Crops(ImageArray):
    """Images as an `ImageArray` has them, but each cut out of a strip.

    images: strips of which one side is that of a crop. size: (H, W) of a crop. is_random: whether
    the place along the strip is a random function of (seed, epoch, index), or in the middle.
    The other arguments are those of `ImageArray`.
    """

    def __init__(
        self, images: Images, size: tuple[int, int], is_random: bool, **arguments: Any
    ) -> None:
        super().__init__(images, **arguments)
        self.size = size
        self.is_random = is_random
        self._epoch: int | None = None
        self._places = np.empty(0)

    def unaugmented(self) -> Self:
        """The same images, not mirrored, and with the crops in the middle."""
        data = super().unaugmented()
        data.is_random = False
        return data

    def _pixels(self, epoch: int, index: int) -> np.ndarray:
        if not self.is_random:
            return cut(self.images[index], self.size)
        if self._epoch != epoch:
            self._places = np.random.default_rng([self.seed, epoch, 3]).random(len(self))
            self._epoch = epoch
        return cut(self.images[index], self.size, self._places[index])


class ImageFolder(StatelessDataModule):
    """The image files below a folder, resized and cropped: (channels, H, W), uint8.

    The subfolders train/, val/ and test/ are the splits. Where val/ or test/ is missing, 5 % of the
    other images take its place, at least one, chosen by a hash of their names: a new file does not
    move others from split to split. Without train/ all images are divided in this way.

    With labels the class of an image is the folder that it is in: DIR/cat/1.png, or
    DIR/train/cat/1.png. Folders inside cat/ belong to the same class.

    root: the folder. `~` is the home folder.
    size: the height and width of an image in pixels, or both as [H, W]. The shorter side is resized
        to it with antialiasing, then the middle is cut out.
    channels: 1 for grey images, 3 for colour.
    labels: whether batches are (image, index, label), where the label is an index of `class_names`.
    skip_unreadable: whether files that cannot be read are left out. If not, the first one ends the
        run.
    cache: the folder for the decoded images; None: `default_cache`.
    random_crop: whether the crops in training are at random places along the longer side.
    hflip: whether half of the training images are mirrored.
    n_bits: how many bits of a pixel are kept, the most significant ones.
    The other arguments are those of `StatelessDataModule`. Raises ValueError: a value is out of
    its range. Raises FileNotFoundError or ValueError, with labels: there are no folders of classes.
    """

    n_bits: int

    def __init__(
        self,
        root: str | Path | None,
        batch_size: int,
        size: int | tuple[int, int] = 32,
        channels: int = 3,
        labels: bool = False,
        skip_unreadable: bool = False,
        cache: str | Path | None = None,
        random_crop: bool = False,
        hflip: bool = False,
        num_workers: int = 0,
        micro_batch: int | None = None,
        seed: int = 0,
        n_bits: int = 8,
    ) -> None:
        super().__init__(batch_size, micro_batch, num_workers, seed)
        self.dequantizer = UniformDequantizer(n_bits)
        if root is None:
            raise ValueError(f"data.root is missing: {ANOTHER_ROOT}")
        if channels not in CHANNELS:
            raise ValueError(f"data.channels={channels}: give 1 for grey images, or 3 for colour")
        self.root = expand_home("data.root", root)
        self.cache = default_cache()
        if cache is not None:
            self.cache = expand_home("data.cache", cache)
        self.size = checked_size(size)
        self.shape = (channels, *self.size)
        self.skip_unreadable = skip_unreadable
        self.random_crop = random_crop
        self.hflip = hflip
        self.n_bits = n_bits
        self.labels = labels
        self._content: Content | None = None
        if labels:
            self.class_names = class_names(self.root)
            self.n_classes = len(self.class_names)

    def _obtain(self) -> None:
        """Decode the images into the cache, if they are not there yet.

        Raises FileNotFoundError or ValueError, one line: there is no such folder, a file cannot be
        read, the images are too few, or the cache cannot be written.
        """
        if not hasattr(self, "test"):
            self._load()

    def setup(self, stage: str | None = None) -> None:
        """Open the images in the cache, once. The errors are those of `prepare_data`."""
        if hasattr(self, "test"):
            return
        self._raise_problems()
        content = self._load()
        parts = {split: content.part(split) for split in SPLITS}
        labels = self._labels(content.files)
        for split, numbers in parts.items():
            of_split = None if labels is None else labels[numbers]
            images = content.decoded.images.choose(numbers)
            setattr(self, split, self._data_set(split, images, of_split))
        self.content_hash = content.sha256
        self._check_same_content()
        for line in self._report(content):
            rank_zero_info(line)

    def current_hash(self) -> str:
        """The sha256 of the images that are in the folder now."""
        files, _ = find_files(self.root)
        read = digests(self.root, [file.path for file in files], self.cache)
        return content_hash([file.name for file in files], read.sums)

    def counts(self) -> dict[str, int]:
        """The size of each split and, if there are any, how many files could not be read."""
        n_unreadable = len(self._load().unreadable)
        if n_unreadable:
            return super().counts() | {"unreadable": n_unreadable}
        return super().counts()

    def state_dict(self) -> dict[str, Any]:
        """The content of the folder, for checkpoints."""
        return {"sha256": self.content_hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with other images than those of a checkpoint. Raises SharedError."""
        if state_dict["sha256"] != self.content_hash:
            raise SharedError(
                f"data.root={shown(self.root)} has other images than when this run began (sha256 "
                f"{self.content_hash}, and then {state_dict['sha256']}): put the earlier ones "
                "back, or give another run_dir"
            )

    def _load(self) -> Content:
        """Find all images and their content, and decode them if they are not in the cache."""
        if self._content is not None:
            return self._content
        files, unused = find_files(self.root)
        counts = Counter(file.split for file in files)
        self._check_counts(counts)
        self._labels(files)
        paths = [file.path for file in files]
        read = digests(self.root, paths, self.cache)
        sha256 = content_hash([file.name for file in files], read.sums)
        reading = Reading(self.shape[0], self.size, whole=self.random_crop)
        image_files = Files(paths, read.states, sha256)
        images = decoded(image_files, reading, self.cache, self.skip_unreadable)
        readable = [file for k, file in enumerate(files) if k not in images.unreadable]
        named = {shown(paths[k]): reason for k, reason in images.unreadable.items()}
        content = Content(readable, images, sha256, named, unused)
        self._check_counts({split: len(content.part(split)) for split in SPLITS})
        self._labels(readable)
        self._content = content
        return content

    def _check_counts(self, counts: Mapping[str, int]) -> None:
        """Raises ValueError: a split has no images, or training has fewer than a batch.

        counts: the number of images of each split.
        """
        for split in SPLITS:
            if not counts.get(split):
                raise ValueError(
                    f"data.root={shown(self.root)} has {sum(counts.values())} images, and none "
                    f"for {split}: add images, or divide them into train/, val/ and test/"
                )
        check_batch_size(self.batch_size, counts["train"])

    def _labels(self, files: Sequence[File]) -> np.ndarray | None:
        """The class of each file, (N,); None without labels.

        Raises ValueError: a file is in no folder of a class, or a class has no training images.
        """
        if self.class_names is None:
            return None
        numbers = {name: k for k, name in enumerate(self.class_names)}
        first_parts = {file.inner.partition("/")[0] for file in files}
        folders = {name: printable(name) for name in first_parts}
        labels = []
        for file in files:
            name, separator, _ = file.inner.partition("/")
            folder = folders[name]
            if not separator:
                raise ValueError(
                    f"data.labels=true, and {shown(file.path)} is in no folder of a class: "
                    "move it into one, or give data.labels=false"
                )
            if folder not in numbers:
                raise ValueError(
                    f"{shown(file.path)} is of the class {folder}, which has no folder in "
                    "train/: add it, or take the file away"
                )
            labels.append(numbers[folder])
        trained = {
            label for label, file in zip(labels, files, strict=True) if file.split == "train"
        }
        for name, number in numbers.items():
            if number not in trained:
                raise ValueError(
                    f"data.labels=true, and the class {name} has no training images: "
                    "add some, or take its folder away"
                )
        return np.array(labels)

    def _data_set(self, split: str, images: Images, labels: np.ndarray | None) -> ImageArray:
        """The data set of a split. Only training images are augmented."""
        is_train = split == "train"
        arguments: dict[str, Any] = {"n_bits": self.n_bits, "labels": labels}
        if is_train:
            arguments |= {"seed": self.seed, "hflip": self.hflip}
        if not self.random_crop:
            return ImageArray(images, **arguments)
        return Crops(images, self.size, is_random=is_train, **arguments)

    def _report(self, content: Content) -> list[str]:
        """What was found in the folder, in lines for the log."""
        counts = ", ".join(f"{len(content.part(split)):,} {split}" for split in SPLITS)
        lines = [f"{shown(self.root)}: {counts} images, sha256 {content.sha256[:12]}"]
        images = content.decoded
        if content.unused:
            n = len(content.unused)
            example = shown(Path(content.unused[0]))
            lines.append(
                f"images outside train/, val/ and test/, which are not used: {n:,}, as {example}"
            )
        if content.unreadable:
            n = len(content.unreadable)
            lines.append(f"files that cannot be read and are left out: {n:,}")
            named = list(content.unreadable.items())[:MOST_NAMED]
            lines += [f"  {path} {reason}" for path, reason in named]
            if n > MOST_NAMED:
                lines.append(f"  and {n - MOST_NAMED:,} more")
        if images.n_transparent:
            n = images.n_transparent
            lines.append(f"images with transparent pixels, which are now on white: {n:,}")
        if images.n_enlarged:
            height, width = self.size
            n = images.n_enlarged
            lines.append(f"images that are smaller than {height}x{width} and are enlarged: {n:,}")
        return lines


def find_files(root: Path) -> tuple[list[File], list[str]]:
    """The images of all splits in a folder, sorted by name, and the names of any others.

    Raises FileNotFoundError or ValueError, as `find_images`; ValueError: val/ or test/ are there
    without train/, or a name of a split is in capitals.
    """
    try:
        paths = find_images(root)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: {ANOTHER_ROOT}") from error
    images = [(path, path.relative_to(root).as_posix()) for path in paths]
    for name in sorted({name.partition("/")[0] for _, name in images if "/" in name}):
        if name not in SPLITS and name.lower() in SPLITS:
            raise ValueError(
                f"data.root={shown(root)} has {name}/: rename it to {name.lower()}/, or to another "
                "name, if it is no split"
            )
    folders = [split for split in SPLITS if (root / split).is_dir()]
    if folders and "train" not in folders:
        raise ValueError(
            f"data.root={shown(root)} has {folders[0]}/, but no train/: add it, or rename "
            f"{folders[0]}/, if it is no split"
        )
    files = []
    unused = []
    for path, name in images:
        first, _, rest = name.partition("/")
        if not folders:
            files.append(File(path, name, name, "train"))
        elif first in SPLITS and rest:
            files.append(File(path, name, rest, first))
        else:
            unused.append(name)
    return hold_out(files), unused


def hold_out(files: list[File]) -> list[File]:
    """The files, with some of train/ in the place of val/ or test/, if these have none.

    They are those of HELD_OUT. If there are none, since the images are few, it is the one with the
    next share: above the bounds for val/, and below them, or the largest, for test/.
    """
    shares = {file: hashed_share(file.inner) for file in files if file.split == "train"}
    missing = [split for split in HELD_OUT if split not in {file.split for file in files}]
    moved: dict[File, str] = {}
    for split in missing:
        low, high = HELD_OUT[split]
        moved |= {file: split for file, share in shares.items() if low <= share < high}
    remaining = sorted(
        (file for file in shares if file not in moved), key=lambda file: shares[file]
    )
    for split in missing:
        if split not in moved.values() and remaining:
            next_one = remaining.pop(0 if split == "val" else -1)
            moved[next_one] = split
    return [file._replace(split=moved.get(file, file.split)) for file in files]


def hashed_share(name: str) -> float:
    """A number in [0, 1) that depends on a name alone, and is uniform over names.

    >>> round(hashed_share("cat/1.png"), 3)
    0.415
    """
    digest = hashlib.sha256(normal(name).encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def class_names(root: Path) -> tuple[str, ...]:
    """The names of the folders of classes, sorted: those in train/ or, without it, in `root`.

    Raises FileNotFoundError or ValueError: there are none.
    """
    try:
        check_folder(root)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: {ANOTHER_ROOT}") from error
    folder = root / "train"
    if not folder.is_dir():
        folder = root
    try:
        names = [path.name for path in folder.iterdir() if path.is_dir()]
    except OSError as error:
        raise ValueError(f"{shown(folder)} cannot be read: {error.strerror}") from error
    classes = sorted({printable(name) for name in names if not name.startswith(".")})
    if not classes:
        raise ValueError(
            f"data.labels=true needs a folder of images for each class in {shown(folder)}, and "
            "there is none: add them, or give data.labels=false"
        )
    return tuple(classes)


def printable(name: str) -> str:
    """A folder's name as the name of a class: composed Unicode, in one line."""
    return normal(shown(Path(name)))


def checked_size(size: int | Sequence[int]) -> tuple[int, int]:
    """The height and width that `data.size` means. Raises ValueError: there is no such size."""
    sides = list(size) if isinstance(size, Sequence) else [size, size]
    if len(sides) != 2:
        raise ValueError(f"data.size={sides}: give one side, or [height,width]")
    for side in sides:
        check_count("data.size", side, least=1, most=LARGEST_SIZE)
    return sides[0], sides[1]
