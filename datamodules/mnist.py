"""MNIST (LeCun et al. 1998) and Fashion-MNIST (Xiao et al. 2017) from the official idx files."""

import gzip
import hashlib
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from datamodules.images import ImageFiles

# Of the unpacked files, so that a file packed by another program than the official one is accepted.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
PREFIXES = {"train": "train", "test": "t10k"}  # of the names of the files of a split
N_LAST = 10_000  # images that data.split=last10000 holds out


class MNIST(ImageFiles):
    """60,000 training and 10,000 test images of digits, (1, 28, 28), uint8, of ten classes.

    root: the folder that contains the four files, packed (.gz) or not. They may be in its subfolder
        MNIST/raw/, as torchvision leaves them, in mnist/, or in the folder itself. Downloaded files
        go into MNIST/raw/. `~` is the home folder.
    n_val: how many training images are held out for validation; 0 for a final run on all 60,000.
    split: which images are held out: `random`, those of a fixed random choice; `last10000`, the
        last 10,000, so that training is on the first 50,000 (n_val must be 10,000 or 0).
    hflip: whether half of the training images are mirrored. A mirrored digit is seldom a digit.
    The other arguments are those of `ImageFiles`. Raises ValueError: a value is out of its range.
    """

    shape = (1, 28, 28)
    n_images = 60_000
    n_classes = 10
    class_names: tuple[str, ...] = tuple("0123456789")
    title = "MNIST"
    md5: Mapping[str, str] = MNIST_MD5
    url = "https://ossci-datasets.s3.amazonaws.com/mnist/"
    folders = ("MNIST/raw", "mnist", ".")  # below root; the first one is for downloads

    def __init__(
        self,
        root: str | Path,
        batch_size: int,
        n_val: int = N_LAST,
        split: Literal["random", "last10000"] = "random",
        hflip: bool = False,
        download: bool = True,
        num_workers: int = 0,
        micro_batch: int | None = None,
        seed: int = 0,
        n_bits: int = 8,
        shift: float = 0.0,
        labels: bool = False,
    ) -> None:
        super().__init__(
            root=root,
            batch_size=batch_size,
            n_val=n_val,
            hflip=hflip,
            download=download,
            num_workers=num_workers,
            micro_batch=micro_batch,
            seed=seed,
            n_bits=n_bits,
            shift=shift,
            labels=labels,
        )
        if split not in ("random", "last10000"):
            raise ValueError(f"data.split={split} is not known: give one of random, last10000")
        if split == "last10000" and n_val not in (0, N_LAST):
            raise ValueError(
                f"data.split=last10000 holds out {N_LAST} images, not data.n_val={n_val}: "
                f"give data.n_val={N_LAST}, or 0 to train on all"
            )
        self.split = split

    def _obtain(self) -> None:
        """Download the files that are missing under `root`, if they are not in memory yet.

        Raises FileNotFoundError: they could not be obtained. Raises ValueError: a download is not
        the official file.
        """
        if hasattr(self, "test"):
            return
        missing = [name for name in self.md5 if self._path(name) is None]
        if not missing:
            return
        if not self.download:
            raise FileNotFoundError(
                f"{self.title} is not complete in data.root={self.root}: "
                f"{self._advice(missing)}, give another data.root, or data.download=true"
            )
        for name in missing:
            self._fetch(name, missing)

    def _advice(self, names: list[str]) -> str:
        files = ", ".join(f"{name}.gz" for name in names)
        return f"put {files} (packed or not, any mirror's copy) into {self.root / self.folders[0]}/"

    def _fetch(self, name: str, missing: list[str]) -> None:
        """Download one file. It gets its name only when it is complete and checked.

        missing: all the files that are to be downloaded, for the message.
        """
        from torchvision.datasets.utils import download_url

        folder = self.root / self.folders[0]
        url = f"{self.url}{name}.gz"
        part = folder / f"{name}.part.gz"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part.unlink(missing_ok=True)  # of a download that was interrupted
            download_url(url, str(folder), part.name)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"{self.title} could not be downloaded from {url} ({error}): "
                f"{self._advice(missing)}"
            ) from error
        read_idx(part, self.md5[name])
        part.replace(folder / f"{name}.gz")

    def _path(self, name: str) -> Path | None:
        """Where a file is, unpacked or packed; None if it is in no folder."""
        paths = [
            self.root / folder / f"{name}{ending}"
            for folder in self.folders
            for ending in ("", ".gz")
        ]
        return next((path for path in paths if path.is_file()), None)

    def _order(self, n: int) -> np.ndarray:
        if self.split == "last10000":
            return np.arange(n)[::-1]
        return super()._order(n)

    def _read_images(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        prefix = PREFIXES[split]
        images = self._read(f"{prefix}-images-idx3-ubyte")
        labels = self._read(f"{prefix}-labels-idx1-ubyte")
        return images[:, None], labels.astype(int)

    def _read(self, name: str) -> np.ndarray:
        path = self._path(name)
        if path is None:
            raise FileNotFoundError(
                f"{self.title} is not complete in data.root={self.root}: {self._advice([name])}"
            )
        return read_idx(path, self.md5[name])


class FashionMNIST(MNIST):
    """60,000 training and 10,000 test images of clothes, (1, 28, 28), uint8, of ten classes.

    The files have the names of MNIST's. They may be in the subfolders FashionMNIST/raw/ or
    fashion_mnist/ of `root`, or in the folder itself. The arguments are those of `MNIST`.
    """

    class_names = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    title = "Fashion-MNIST"
    md5 = FASHION_MNIST_MD5
    url = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    folders = ("FashionMNIST/raw", "fashion_mnist", ".")


def read_idx(path: Path, md5: str) -> np.ndarray:
    """The array of an idx file of bytes, packed (.gz) or not, uint8.

    A file begins with a magic number, 0x0800 plus the number of axes, and the length of each axis,
    all of them big-endian int32. The number of axes is also in the official names: `idx3`, `idx1`.

    md5: of the unpacked file. Raises ValueError: the file is damaged, or it is another file.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise damaged(path, f"it cannot be unpacked: {error}") from error
    n_axes = 1 if "idx1" in path.name else 3
    magic = int.from_bytes(content[:4], "big")
    if magic != 0x0800 + n_axes:
        raise damaged(path, f"its magic number is {magic}, not {0x0800 + n_axes}")
    start = 4 + 4 * n_axes
    if len(content) < start:
        raise damaged(path, f"it has {len(content):,} bytes, fewer than its header")
    shape = tuple(int(length) for length in np.frombuffer(content[4:start], ">i4"))
    size = start + math.prod(shape)
    if len(content) != size:
        raise damaged(path, f"it has {len(content):,} bytes, not the {size:,} of its header")
    if hashlib.md5(content).hexdigest() != md5:
        raise damaged(path, f"its content does not have the official md5 {md5}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


FETCHES = " (data.download=true fetches it)"  # the end of the message of `damaged`


def damaged(path: Path, reason: str) -> ValueError:
    """The error for a file that is not the official one; `reason` says how that is known."""
    return ValueError(
        f"{path} is damaged or another file ({reason}): delete it and put the official file there"
        f"{FETCHES}"
    )
