"""Folders of photographs of any size, and of their low-resolution images, decoded into a cache."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datamodules.evaluation_sets import KNOWN
from datamodules.folder import hashed_share
from datamodules.image_cache import Digests, Files, Reading, content_hash, decoded, digests
from datamodules.image_cache import Images as DecodedImages
from datamodules.image_files import find_images, normal, shown
from datamodules.images import Images

CHANNELS = 3
WHOLE = Reading(CHANNELS, None, whole=True)
ADVICE = "repair it, or take it away"  # where a file cannot be read


class Joined:
    """The images of several folders, one after another. The item k is (C, H, W), uint8.

    parts: for each folder its images. chosen: (number of the part, number in it) of each image.
    """

    def __init__(self, parts: Sequence[Images], chosen: Sequence[tuple[int, int]]) -> None:
        self.parts = parts
        self.chosen = chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, k: int) -> np.ndarray:
        part, number = self.chosen[k]
        return self.parts[part][number]

    def shape(self, k: int) -> tuple[int, ...]:
        """The shape (C, H, W) of an image."""
        return tuple(self[k].shape)

    def choose(self, numbers: Sequence[int]) -> "Joined":
        """Some of the images, by their numbers in this object."""
        return Joined(self.parts, [self.chosen[k] for k in numbers])


class Photographs(NamedTuple):
    """Images with their names, the sha256 of their files, and their own low-resolution images."""

    images: Joined
    names: list[str]
    sums: list[str]
    low_res: Joined | None

    def choose(self, numbers: Sequence[int]) -> "Photographs":
        """Some of them."""
        low_res = self.low_res
        if low_res is not None:
            low_res = low_res.choose(numbers)
        names = [self.names[k] for k in numbers]
        sums = [self.sums[k] for k in numbers]
        return Photographs(self.images.choose(numbers), names, sums, low_res)


class Listing(NamedTuple):
    """The image files below a folder. names: their paths below it. read: their content."""

    root: Path
    paths: list[Path]
    names: list[str]
    read: Digests

    @property
    def content(self) -> str:
        """One sha256 of all files."""
        return content_hash(self.names, self.read.sums)


def listings_of(roots: Sequence[Path], cache: Path) -> list[Listing]:
    """The files in folders, with their content.

    cache: the cache folder. Raises FileNotFoundError or ValueError, as `find_images`.
    """
    listings = []
    for root in roots:
        paths = find_images(root)
        names = [path.relative_to(root).as_posix() for path in paths]
        listings.append(Listing(root, paths, names, digests(root, paths, cache)))
    return listings


def photographs_in(
    roots: Sequence[Path], low_res_roots: Sequence[Path], scale: int, cache: Path
) -> Photographs:
    """The photographs in folders, decoded.

    low_res_roots: for each folder that of the low-resolution images; empty: there are none. scale:
    how many times as high and wide the photographs are. cache: the cache folder.

    Raises FileNotFoundError or ValueError, one line: a folder is missing or empty, a file cannot be
    read, images do not form pairs, or the cache cannot be written.
    """
    listings = listings_of(roots, cache)
    parts = [decoded_images(listing, cache) for listing in listings]
    chosen = [
        (part, number)
        for part, listing in enumerate(listings)
        for number in range(len(listing.names))
    ]
    low_res = None
    if low_res_roots:
        partners = listings_of(low_res_roots, cache)
        low_res = low_res_images(listings, parts, partners, scale, cache)
    return Photographs(
        Joined(parts, chosen),
        [f"{prefix}{name}" for prefix, listing in prefixed(listings) for name in listing.names],
        [digest for listing in listings for digest in listing.read.sums],
        low_res,
    )


def low_res_images(
    listings: Sequence[Listing],
    parts: Sequence[DecodedImages],
    partners: Sequence[Listing],
    scale: int,
    cache: Path,
) -> Joined:
    """The low-resolution images of photographs, in the order of the photographs.

    listings, parts: the folders of the photographs and their images. partners: for each of these
    folders that of the low-resolution images. Raises ValueError, as `photographs_in`.
    """
    decoded_parts = [decoded_images(partner, cache) for partner in partners]
    chosen = []
    for part, (listing, partner) in enumerate(zip(listings, partners, strict=True)):
        numbers = paired(listing, partner, scale)
        for k, number in enumerate(numbers):
            check_pair(
                (listing.paths[k], parts[part].shapes[k]),
                (partner.paths[number], decoded_parts[part].shapes[number]),
                scale,
            )
        chosen += [(part, number) for number in numbers]
    return Joined(decoded_parts, chosen)


def decoded_images(listing: Listing, cache: Path) -> DecodedImages:
    """The images in a folder, from the cache or, if they are not there, decoded into it."""
    files = Files(listing.paths, listing.read.states, listing.content)
    return decoded(files, WHOLE, cache, skip=False, advice=ADVICE).images


def prefixed(listings: Sequence[Listing]) -> list[tuple[str, Listing]]:
    """What comes before the names of each folder's images: nothing if there is one folder."""
    if len(listings) == 1:
        return [("", listings[0])]
    return [(f"{listing.root.name}/", listing) for listing in listings]


def held_out_numbers(names: Sequence[str], n: int) -> list[int]:
    """The numbers of the n names whose hashes are the smallest, in the order of the hashes.

    So a new name takes the place of one that was held out, or of none. ValueError: no name would
    be left.
    """
    if n >= len(names):
        raise ValueError(
            f"data.root has {len(names)} images, of which {n} would be held out: give a smaller "
            "data.n_val, or data.val_root and data.test_root"
        )
    order = sorted(range(len(names)), key=lambda number: hashed_share(names[number]))
    return order[:n]


def paired(listing: Listing, partner: Listing, scale: int) -> list[int]:
    """The number of the low-resolution image of each photograph.

    listing: the photographs. partner: the files of the low-resolution images. ValueError: one has
    none, or several.
    """
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(partner.names):
        numbers.setdefault(stem(name), []).append(number)
    partners = []
    for path, name in zip(listing.paths, listing.names, strict=True):
        found = numbers.get(stem(name)) or numbers.get(f"{stem(name)}x{scale}") or []
        if len(found) != 1:
            raise ValueError(
                f"{shown(path)} has {len(found)} low-resolution images in {shown(partner.root)}: "
                f"give it one of the same name, or with x{scale} before the ending"
            )
        partners.append(found[0])
    return partners


def stem(name: str) -> str:
    """The name of a file without its ending, in composed Unicode.

    >>> stem("people/0001.jpg")
    'people/0001'
    """
    return normal(str(Path(name).with_suffix("").as_posix()))


Sized = tuple[Path, np.ndarray]  # a file, and the shape of its image


def check_pair(photograph: Sized, low_res: Sized, scale: int) -> None:
    """Refuse a pair of which one image is not `scale` times as large. Raises ValueError."""
    for axis in (1, 2):
        length = int(photograph[1][axis])
        sides = (length // scale, math.ceil(length / scale))
        if int(low_res[1][axis]) not in sides:
            raise ValueError(
                f"{shown(low_res[0])} has {sides_of(low_res[1])} pixels, and "
                f"{shown(photograph[0])} has {sides_of(photograph[1])}: give another data.scale, "
                f"or a low-resolution image with 1/{scale} of the sides"
            )


def sides_of(shape: Sequence[int] | np.ndarray) -> str:
    """The size of an image of shape (C, H, W), for a message.

    >>> sides_of((3, 20, 30))
    '20x30'
    """
    return f"{shape[1]}x{shape[2]}"


def check_known_set(root: Path) -> None:
    """Refuse a folder of a known set that has another number of images than the set.

    Raises ValueError; FileNotFoundError: there is no such folder.
    """
    place = f"/{root.absolute().as_posix()}"
    for name, known in KNOWN.items():
        if not any(place.endswith(f"/{folder}") for folder in known.folders):
            continue
        n = len(find_images(root))
        if n != known.n:
            raise ValueError(
                f"{shown(root)} has {n} images, but {name} has {known.n}: leave the set's own "
                "images in it, in full resolution"
            )


def check_large_enough(part: Photographs, side: int, remedy: str = "") -> None:
    """Refuse images with a side of fewer pixels than `side`.

    remedy: what else a user may do than leave them out, for the message. Raises ValueError.
    """
    shapes = [part.images.shape(number) for number in range(len(part.images))]
    small = [number for number, shape in enumerate(shapes) if min(shape[1:]) < side]
    if small:
        number = small[0]
        raise ValueError(
            f"{len(small)} of {len(shapes)} images have a side of less than {side} pixels, as "
            f"{shown(Path(part.names[number]))} with {sides_of(shapes[number])}: "
            f"leave them out{remedy}"
        )


def check_not_in_training(part: Photographs, train: Photographs, key: str) -> None:
    """Refuse images for evaluation that are also trained on. key: of their folder. ValueError."""
    trained = set(train.sums)
    common = [name for name, digest in zip(part.names, part.sums, strict=True) if digest in trained]
    if common:
        raise ValueError(
            f"{len(common)} of the images of {key} are also in data.root, as "
            f"{shown(Path(common[0]))}: a model must not be measured on what it was trained on, so "
            "take them away from one of the two"
        )
