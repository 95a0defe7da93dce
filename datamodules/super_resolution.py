"""Photographs for super-resolution: crops with their low-resolution images, and whole images."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.bicubic import downscale
from datamodules.checks import SharedError, check_count, check_memory, expand_home
from datamodules.dequantization import UniformDequantizer
from datamodules.evaluation_sets import cropped
from datamodules.image_cache import content_hash, default_cache
from datamodules.images import Images
from datamodules.photograph_folders import (
    CHANNELS,
    Joined,
    Photographs,
    check_known_set,
    check_large_enough,
    check_not_in_training,
    held_out_numbers,
    listings_of,
    photographs_in,
)
from datamodules.photos import NAMES, photographs, region
from datamodules.samplers import EvalSampler, Key, check_batch_size
from datamodules.stateless import StatelessDataModule, n_items

OR_SMALLER = ", or give a smaller data.crop"
SPLITS = ("train", "val", "test")
LARGEST_SCALE = 16
LARGEST_CROP = 4096  # pixels
DRAW_BYTES = 64  # memory for the random numbers of a crop, and for its place in the order
Root = str | Path | Sequence[str]  # a folder, or a list of folders
Item = tuple[Tensor, int, Tensor]  # high_res, index, low_res
Place = tuple[float, float]  # vertically and horizontally, each from 0 to 1


class Draws(NamedTuple):
    """The random numbers of one epoch, for n crops.

    photographs: (n,), which one each crop is cut out of. places: (n, 2), where it is vertically and
    horizontally, from 0 to less than 1. flips: (n,) bool, whether it is mirrored.
    """

    epoch: int
    photographs: np.ndarray
    places: np.ndarray
    flips: np.ndarray


class Crops(Dataset[Item]):
    """n random crops an epoch, with their low-resolution images.

    The item of key (epoch, index) is (high_res, index, low_res), a function of (seed, epoch,
    index): high_res is (3, crop, crop), and low_res is (3, crop/scale, crop/scale), both uint8.
    Every photograph has the same number of crops in an epoch, up to one.

    A low_res image is computed from the crop, as in SRFlow's own data, or cut out of the
    photograph's own low-resolution image. The crop is then at a multiple of the scale.

    photographs: (3, H, W) uint8 each, at least as large as a crop.
    low_res: an image of each photograph with sides of H // scale and W // scale, or more; None: it
        is computed.
    n: the number of crops. crop: their side, in pixels, a multiple of `scale`.
    hflip: whether half of the crops are mirrored.
    """

    def __init__(
        self,
        photographs: Images,
        low_res: Images | None,
        n: int,
        crop: int,
        scale: int,
        seed: int,
        hflip: bool,
    ) -> None:
        self.photographs = photographs
        self.low_res = low_res
        self.n = n
        self.crop = crop
        self.scale = scale
        self.seed = seed
        self.hflip = hflip
        self.is_random = True
        self._draws: Draws | None = None

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, key: Key) -> Item:
        epoch, index = key
        number = index
        place = (0.5, 0.5)
        is_mirrored = False
        if self.is_random:
            draws = self._draws_of(epoch)
            number = int(draws.photographs[index])
            place = (draws.places[index, 0], draws.places[index, 1])
            is_mirrored = self.hflip and bool(draws.flips[index])
        if self.low_res is None:
            high_res = self._crop(number, place, is_mirrored)
            return high_res, index, downscale(high_res[None], self.scale)[0]
        high_res, low_res = self._pair(self.low_res[number], number, place, is_mirrored)
        return high_res, index, low_res

    def unaugmented(self) -> Self:
        """The middle of each photograph, not mirrored."""
        data = copy.copy(self)
        data.n = len(self.photographs)
        data.is_random = False
        return data

    def _draws_of(self, epoch: int) -> Draws:
        if self._draws is None or self._draws.epoch != epoch:
            flips = np.random.default_rng([self.seed, epoch, 1]).random(self.n) < 0.5
            places = np.random.default_rng([self.seed, epoch, 2]).random((self.n, 2))
            order = np.random.default_rng([self.seed, epoch, 3]).permutation(len(self.photographs))
            self._draws = Draws(epoch, np.resize(order, self.n), places, flips)
        return self._draws

    def _crop(self, number: int, place: Place, is_mirrored: bool) -> Tensor:
        """The crop of a photograph at a place."""
        photograph = self.photographs[number]
        top, left = corner(photograph.shape, self.crop, place)
        return tensor_of(window(photograph, top, left, self.crop), is_mirrored)

    def _pair(
        self, low_res: np.ndarray, number: int, place: Place, is_mirrored: bool
    ) -> tuple[Tensor, Tensor]:
        """The crops of a photograph and of its low-resolution image at the same place."""
        photograph = self.photographs[number]
        side = self.crop // self.scale
        shape = tuple(length // self.scale for length in photograph.shape)
        top, left = corner(shape, side, place)
        high_res = window(photograph, self.scale * top, self.scale * left, self.crop)
        return (
            tensor_of(high_res, is_mirrored),
            tensor_of(window(low_res, top, left, side), is_mirrored),
        )


def corner(shape: Sequence[int], side: int, place: Place) -> tuple[int, int]:
    """The first row and column of a square at a place in an image (C, H, W).

    place: vertically and horizontally, 0 for the upper left position, up to 1 for the last one.

    >>> corner((3, 10, 20), side=4, place=(0.5, 0.99))
    (3, 16)
    """
    top = min(int(place[0] * (shape[-2] - side + 1)), shape[-2] - side)
    left = min(int(place[1] * (shape[-1] - side + 1)), shape[-1] - side)
    return top, left


def window(image: np.ndarray, top: int, left: int, side: int) -> np.ndarray:
    """A square of an image (C, H, W)."""
    return image[:, top : top + side, left : left + side]


def tensor_of(pixels: np.ndarray, is_mirrored: bool = False) -> Tensor:
    """A copy of pixels (C, H, W), since those of a cache must not be written."""
    if is_mirrored:
        pixels = pixels[:, :, ::-1]
    return torch.from_numpy(np.array(pixels, order="C"))


class WholeImages(Dataset[Item]):
    """Whole images for evaluation, whose sides are cut to multiples of the scale.

    The item of key (epoch, index) is (high_res, index, low_res), whatever the epoch: high_res is
    (3, H, W), and low_res is (3, H/scale, W/scale), both uint8, of a size that differs between
    images. The right and lower border is cut off, as in `datamodules.evaluation_sets`.

    images: (3, H, W) uint8 each. low_res: their own low-resolution images; None: computed. names:
    of the images, for tables and pictures.
    """

    def __init__(
        self, images: Images, low_res: Images | None, scale: int, names: Sequence[str]
    ) -> None:
        self.images = images
        self.low_res = low_res
        self.scale = scale
        self.names = names

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Item:
        _, index = key
        high_res = cropped(tensor_of(self.images[index]), self.scale).contiguous()
        if self.low_res is None:
            return high_res, index, downscale(high_res[None], self.scale)[0]
        height = high_res.shape[1] // self.scale
        width = high_res.shape[2] // self.scale
        return high_res, index, tensor_of(self.low_res[index][:, :height, :width])


class SuperResolution(StatelessDataModule):
    """Photographs and their low-resolution images: batches are (high_res, index, low_res), uint8.

    Training uses random crops, (3, crop, crop) with (3, crop/scale, crop/scale). Validation and
    test use whole images, whose sides are cut to multiples of the scale, one in a batch. Where a
    low-resolution image is not given it is made by bicubic interpolation as in MATLAB
    (`datamodules.bicubic`), for training from the crop itself.

    In the place of a root, and of a val_root or test_root beside it, are the photographs inside
    scikit-image and scikit-learn, divided as for data.name=photos.

    root: a folder with photographs of any size, or a list of folders; subfolders are looked into.
    val_root, test_root: the same for validation and test. None: n_val images of `root`, for each of
        the two, are held out, chosen by a hash of their names. A folder that is called as a set of
        `evaluation_sets.KNOWN`, such as Set5, has to have its number of images.
    low_res_root, val_low_res_root, test_low_res_root: for a user's own pairs, a folder of
        low-resolution images for each folder of photographs. The names have to be the same, except
        for the ending, or with x<scale> behind the name, as in DIV2K. None: they are computed.
    scale: how many times as high and wide the photographs are as the low-resolution images.
    crop: the side of a training crop, in pixels of the photograph, a multiple of the scale.
    epoch_images: the number of crops in an epoch.
    n_val: the number of validation images, where `val_root` is None; 0: there is no validation.
    hflip: whether half of the training crops are mirrored.
    cache: the folder for the decoded images; None: `default_cache`.
    The other arguments are those of `StatelessDataModule`. `shape` is that of a training crop.

    Raises ValueError: a value is out of its range, or does not fit another.
    """

    n_bits = 8
    shape: tuple[int, int, int]

    def __init__(
        self,
        root: Root | None = None,
        batch_size: int = 16,
        scale: int = 4,
        crop: int = 160,
        epoch_images: int = 10_000,
        n_val: int = 5,
        val_root: Root | None = None,
        test_root: Root | None = None,
        low_res_root: Root | None = None,
        val_low_res_root: Root | None = None,
        test_low_res_root: Root | None = None,
        hflip: bool = True,
        cache: str | Path | None = None,
        num_workers: int = 0,
        micro_batch: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, micro_batch, num_workers, seed)
        check_count("data.scale", scale, least=1, most=LARGEST_SCALE)
        check_count("data.crop", crop, least=1, most=LARGEST_CROP)
        if crop % scale:
            raise ValueError(
                f"data.crop={crop} is not a multiple of data.scale={scale}: "
                f"give {max(1, round(crop / scale)) * scale}"
            )
        check_count("data.epoch_images", epoch_images, least=1)
        check_count("data.n_val", n_val, least=0)
        check_memory(f"data.epoch_images={epoch_images}", DRAW_BYTES * epoch_images)
        check_batch_size(batch_size, epoch_images)
        self.roots = {
            "train": folders("data.root", root),
            "val": folders("data.val_root", val_root),
            "test": folders("data.test_root", test_root),
        }
        self.low_res_roots = {
            "train": folders("data.low_res_root", low_res_root),
            "val": folders("data.val_low_res_root", val_low_res_root),
            "test": folders("data.test_low_res_root", test_low_res_root),
        }
        self._check_roots(n_val)
        self.cache = default_cache()
        if cache is not None:
            self.cache = expand_home("data.cache", cache)
        self.dequantizer = UniformDequantizer(self.n_bits)
        self.scale = scale
        self.crop = crop
        self.shape = (CHANNELS, crop, crop)
        self.epoch_images = epoch_images
        self.n_val = n_val
        self.hflip = hflip
        self._parts: dict[str, Photographs] | None = None

    def _check_roots(self, n_val: int) -> None:
        """Raises ValueError: folders are missing that others need."""
        for split in SPLITS:
            key = key_of_split(split)
            low_res_key = key.replace("root", "low_res_root")
            n = len(self.roots[split])
            n_low_res = len(self.low_res_roots[split])
            if n_low_res not in (0, n):
                raise ValueError(
                    f"{low_res_key} has {n_low_res} folders, and {key} has {n}: "
                    "give a folder of low-resolution images for each folder of photographs"
                )
        if not self.roots["train"]:
            if not self.roots["val"]:
                check_count("data.n_val", n_val, least=0, most=len(NAMES))
        elif not self.roots["test"] and n_val == 0:
            raise ValueError(
                "data.n_val=0 holds out no images of data.root for the test: give data.test_root"
            )

    # ------------------------------------------------------------------------------ reading

    def _obtain(self) -> None:
        """Decode the images into the cache, if they are not there yet.

        Raises FileNotFoundError or ValueError, one line: there is no such folder, a file cannot be
        read, images are too few or too small, have no low-resolution image, or the cache cannot be
        written.
        """
        if not hasattr(self, "test"):
            self._load()

    def setup(self, stage: str | None = None) -> None:
        """Open the images in the cache, once. The errors are those of `prepare_data`."""
        if hasattr(self, "test"):
            return
        self._raise_problems()
        parts = self._load()
        self.content_hash = self.current_hash()
        train = parts["train"]
        self.train = Crops(
            train.images,
            train.low_res,
            self.epoch_images,
            self.crop,
            self.scale,
            self.seed,
            self.hflip,
        )
        self.val = self._whole(parts["val"])
        self.test = self._whole(parts["test"])
        self._check_same_content()
        rank_zero_info(
            f"photographs: {len(train.images):,} for training, of which an epoch has "
            f"{self.epoch_images:,} crops, {n_items(self.val):,} for validation, "
            f"{n_items(self.test):,} for the test"
        )

    def _whole(self, part: Photographs) -> WholeImages:
        """The evaluation set of some photographs."""
        return WholeImages(part.images, part.low_res, self.scale, part.names)

    def _load(self) -> dict[str, Photographs]:
        """The photographs of each split, decoded into the cache if they are in folders."""
        if self._parts is not None:
            return self._parts
        for root in (*self.roots["val"], *self.roots["test"]):
            check_known_set(root)
        given = {
            split: photographs_in(
                self.roots[split], self.low_res_roots[split], self.scale, self.cache
            )
            for split in SPLITS
            if self.roots[split]
        }
        if "train" in given:
            parts = with_held_out(given, self.n_val)
        else:
            parts = embedded(self.n_val) | given
        check_large_enough(parts["train"], self.crop, OR_SMALLER)
        for split in ("val", "test"):
            check_large_enough(parts[split], self.scale)
            if split in given:
                check_not_in_training(parts[split], parts["train"], key_of_split(split))
        self._parts = parts
        return parts

    def current_hash(self) -> str | None:
        """The sha256 of the images that are in all folders now; None for the embedded ones."""
        if not any(self.roots.values()):
            return None
        names = []
        sums = []
        for kind, roots in (("high", self.roots), ("low", self.low_res_roots)):
            for split in SPLITS:
                for number, listing in enumerate(listings_of(roots[split], self.cache)):
                    names.append(f"{kind}/{split}/{number}")
                    sums.append(listing.content)
        return content_hash(names, sums)

    def counts(self) -> dict[str, int]:
        """The size of each split, where that of training is the number of crops in an epoch."""
        train = self.train
        assert isinstance(train, Crops)
        return super().counts() | {"photographs": len(train.photographs)}

    def state_dict(self) -> dict[str, Any]:
        """The content of the folders, for checkpoints."""
        return {"sha256": self.content_hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with other images than those of a checkpoint. Raises SharedError."""
        if state_dict["sha256"] != self.content_hash:
            raise SharedError(
                f"the folders of data.root have other images than when this run began (sha256 "
                f"{self.content_hash}, and then {state_dict['sha256']}): put the earlier ones "
                "back, or give another run_dir"
            )

    def _eval_loader(self, data: Dataset) -> DataLoader:
        """The images of this rank, one a batch, since they have different sizes."""
        rank, world_size = self._rank_and_world()
        loader = super()._eval_loader(data)
        sampler = EvalSampler(n_items(data), rank, world_size)
        return DataLoader(loader.dataset, 1, sampler=sampler, **self._workers())


def key_of_split(split: str) -> str:
    """The setting with the folders of a split.

    >>> key_of_split("train"), key_of_split("val")
    ('data.root', 'data.val_root')
    """
    if split == "train":
        return "data.root"
    return f"data.{split}_root"


def folders(key: str, value: Root | None) -> list[Path]:
    """The folders that a setting names: one, several or, for None, none.

    key: the setting. ValueError: the list is empty, or `~` is of no user.
    """
    if value is None:
        return []
    if isinstance(value, str | Path):
        value = [str(value)]
    if not value:
        raise ValueError(f"{key}=[] names no folder: give one, or null")
    return [expand_home(key, each) for each in value]


def with_held_out(given: dict[str, Photographs], n: int) -> dict[str, Photographs]:
    """The photographs of all splits, where n of those for training are held out for each other one.

    given: the splits that have folders, with "train". ValueError: the photographs are too few.
    """
    train = given["train"]
    missing = [split for split in ("val", "test") if split not in given]
    held_out = held_out_numbers(train.names, len(missing) * n)
    parts = dict(given)
    for place, split in enumerate(missing):
        parts[split] = train.choose(sorted(held_out[place :: len(missing)]))
    parts["train"] = train.choose(sorted(set(range(len(train.names))) - set(held_out)))
    return parts


def embedded(n_val: int) -> dict[str, Photographs]:
    """The photographs inside scikit-image and scikit-learn, in three regions without an overlap.

    n_val: how many of the regions for validation are used.
    """
    photos = photographs()
    parts = {}
    for split in SPLITS:
        images = [np.ascontiguousarray(region(p, split).transpose(2, 0, 1)) for p in photos]
        chosen = [(0, number) for number in range(len(images))]
        joined = Joined([images], chosen)
        parts[split] = Photographs(joined, list(NAMES), [""] * len(images), None)
    return parts | {"val": parts["val"].choose(range(min(n_val, len(NAMES))))}
