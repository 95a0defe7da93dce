"""CIFAR-10 (Krizhevsky 2009) from the official pickles."""

import hashlib
import pickle
from pathlib import Path

import numpy as np

from datamodules.dequantization import UniformDequantizer
from datamodules.images import ImageArray
from datamodules.stateless import StatelessDataModule

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE, ARCHIVE_MD5 = "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"
FOLDER = "cifar-10-batches-py"
TRAIN_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}
TEST_MD5 = {"test_batch": "40351d587109b95175f43aff81a1287e"}
SPLIT_SEED = 0  # the validation split is the same in every run, whatever its seed


class CIFAR10(StatelessDataModule):
    """50,000 training and 10,000 test images, 3x32x32, uint8.

    root: the folder that holds cifar-10-batches-py/ (or the archive cifar-10-python.tar.gz, which is then unpacked).
    n_val: images of the training set held out for validation, a split of our own (the authors publish none); 0 for
    a final run on all 50,000. hflip: horizontal flips in training (Dinh et al. 2017, section 4.1).
    download: fetch the official archive where the files are missing. n_bits: the most significant ones are kept.
    shift: the largest shift along each axis in training, as a share of the side (openai/glow, --dal 1: 0.1).
    labels: batches are (image, index, label), with the number of the class among `class_names`.
    """

    shape = (3, 32, 32)
    n_classes = 10
    class_names = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )

    def __init__(
        self,
        root: str | Path,
        batch_size: int,
        n_val: int = 5000,
        hflip: bool = True,
        download: bool = True,
        num_workers: int = 0,
        micro_batch: int | None = None,
        seed: int = 0,
        n_bits: int = 8,
        shift: float = 0.0,
        labels: bool = False,
    ) -> None:
        super().__init__(batch_size, micro_batch, num_workers, seed)
        if not 0 <= shift < 1:
            raise ValueError(f"data.shift={shift} is a share of the side: give 0 to less than 1")
        self.root, self.n_val, self.hflip, self.download = Path(root), n_val, hflip, download
        self.n_bits, self.dequantizer = n_bits, UniformDequantizer(n_bits)
        self.shift, self.labels = shift, labels

    def prepare_data(self) -> None:
        """Have the pickles under `root`: as they are, from the archive beside them, or from the official host."""
        if all((self.root / FOLDER / name).is_file() for name in TRAIN_MD5 | TEST_MD5):
            return
        from torchvision.datasets.utils import check_integrity, download_url, extract_archive

        archive = self.root / ARCHIVE
        place = f"put {ARCHIVE} (md5 {ARCHIVE_MD5}, any mirror's copy) into {self.root}/"
        if not check_integrity(str(archive), ARCHIVE_MD5):
            if not self.download:
                other = "give another data.root, or data.download=true"
                raise FileNotFoundError(
                    f"CIFAR-10 is not in data.root={self.root}: {place}, {other}"
                )
            print(
                f"Downloading CIFAR-10 (170 MB; the official host is slow, about an hour). Faster: {place}",
                flush=True,
            )
            try:
                if archive.exists():  # broken off, or not the official one: kept aside
                    archive.replace(archive.with_name(f"{ARCHIVE}.bad"))
                download_url(URL, str(self.root), ARCHIVE, ARCHIVE_MD5)
            except (OSError, RuntimeError) as error:
                raise FileNotFoundError(
                    f"CIFAR-10 could not be downloaded from {URL} ({error}): {place}"
                ) from error
        extract_archive(str(archive), str(self.root))

    def setup(self, stage: str | None = None) -> None:
        if not 0 <= self.n_val <= 50_000 - self.batch_size:
            raise ValueError(
                f"data.n_val={self.n_val} leaves no training batch: give 0 to {50_000 - self.batch_size}"
            )
        if hasattr(self, "test"):
            return
        images, labels = self._read_all(TRAIN_MD5)
        order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
        train, val = np.sort(order[self.n_val :]), np.sort(order[: self.n_val])
        self.train = self._images(
            images[train], labels[train], seed=self.seed, hflip=self.hflip, shift=self.shift
        )
        self.val = self._images(images[val], labels[val])
        self.test = self._images(*self._read_all(TEST_MD5))

    def _images(self, images: np.ndarray, labels: np.ndarray, **augmentation) -> ImageArray:
        return ImageArray(
            images, n_bits=self.n_bits, labels=labels if self.labels else None, **augmentation
        )

    def _read_all(self, files: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
        images, labels = zip(*(self._read(name, md5) for name, md5 in files.items()), strict=True)
        return np.concatenate(images), np.concatenate(labels)

    def _read(self, name: str, md5: str) -> tuple[np.ndarray, list[int]]:
        """One pickle's images, (N, 3, 32, 32) uint8, and their classes. The md5 also makes unpickling safe."""
        path = self.root / FOLDER / name
        if not path.is_file():
            raise FileNotFoundError(
                f"CIFAR-10 is not in {path.parent}: set data.root to the folder that holds {FOLDER}/"
            )
        content = path.read_bytes()
        if hashlib.md5(content).hexdigest() != md5:
            raise ValueError(
                f"{path} is damaged ({len(content):,} bytes, not the official md5 {md5}): "
                f"delete {path.parent} and unpack {ARCHIVE} again (data.download=true fetches it)"
            )
        batch = pickle.loads(content, encoding="bytes")
        return batch[b"data"].reshape(-1, *self.shape), batch[b"labels"]
