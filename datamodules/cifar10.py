"""CIFAR-10 (Krizhevsky 2009) from the official pickles."""

import hashlib
import pickle
from pathlib import Path

import numpy as np

from datamodules.images import ImageFiles

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
FOLDER = "cifar-10-batches-py"
TRAIN_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}
TEST_MD5 = {"test_batch": "40351d587109b95175f43aff81a1287e"}


class CIFAR10(ImageFiles):
    """50,000 training and 10,000 test images, (3, 32, 32), uint8, of ten classes.

    root: the folder that contains cifar-10-batches-py/, or the archive cifar-10-python.tar.gz,
        which is then unpacked. `~` is the home folder.
    hflip: whether half of the training images are mirrored (Dinh et al. 2017, section 4.1).
    download: whether to fetch the official archive where the files are missing.
    The other arguments are those of `ImageFiles`. Raises ValueError: a value is out of its range.
    """

    shape = (3, 32, 32)
    n_images = 50_000
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

    def _obtain(self) -> None:
        """Make sure that the pickles are under `root`, if they are not in memory yet.

        If they are missing, they are unpacked from the archive in `root`, or else from a download
        of the official archive. Raises FileNotFoundError: they could not be obtained.
        """
        if hasattr(self, "test"):
            return
        if all((self.root / FOLDER / name).is_file() for name in TRAIN_MD5 | TEST_MD5):
            return
        from torchvision.datasets.utils import check_integrity, extract_archive

        archive = self.root / ARCHIVE
        if not check_integrity(str(archive), ARCHIVE_MD5):
            self._fetch(archive)
        extract_archive(str(archive), str(self.root))

    def _fetch(self, archive: Path) -> None:
        """Download the archive.

        Raises FileNotFoundError: `download` is false, or the download has failed.
        """
        from torchvision.datasets.utils import download_url

        advice = f"put {ARCHIVE} (md5 {ARCHIVE_MD5}, any mirror's copy) into {self.root}/"
        if not self.download:
            raise FileNotFoundError(
                f"CIFAR-10 is not in data.root={self.root}: {advice}, "
                "give another data.root, or data.download=true"
            )
        print(
            "Downloading CIFAR-10 (170 MB; the official host is slow, about an hour). "
            f"Faster: {advice}",
            flush=True,
        )
        try:
            if archive.exists():  # keep it: it may be an incomplete download or another file
                archive.replace(archive.with_name(f"{ARCHIVE}.bad"))
            download_url(URL, str(self.root), ARCHIVE, ARCHIVE_MD5)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"CIFAR-10 could not be downloaded from {URL} ({error}): {advice}"
            ) from error

    def _read_images(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """The images of all pickles of a split, (N, 3, 32, 32) uint8, and their classes, (N,)."""
        files = {"train": TRAIN_MD5, "test": TEST_MD5}[split]
        images, labels = zip(*(self._read(name, md5) for name, md5 in files.items()), strict=True)
        return np.concatenate(images), np.concatenate(labels)

    def _read(self, name: str, md5: str) -> tuple[np.ndarray, list[int]]:
        """The images of one pickle, (N, 3, 32, 32) uint8, and their classes.

        The md5 is checked first, since unpickling other content could run arbitrary code.
        """
        path = self.root / FOLDER / name
        if not path.is_file():
            raise FileNotFoundError(
                f"CIFAR-10 is not in {path.parent}: "
                f"set data.root to the folder that contains {FOLDER}/"
            )
        content = path.read_bytes()
        if hashlib.md5(content).hexdigest() != md5:
            raise ValueError(
                f"{path} is damaged ({len(content):,} bytes, not the official md5 {md5}): "
                f"delete {path.parent} and unpack {ARCHIVE} again (data.download=true fetches it)"
            )
        batch = pickle.loads(content, encoding="bytes")
        return batch[b"data"].reshape(-1, *self.shape), batch[b"labels"]
