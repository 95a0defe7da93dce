"""A folder of images as a data set: splits, classes, the cache, the hash of the content, runs."""

import errno
import hashlib
import itertools
import json
import os
import pickle
import shutil
import unicodedata
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_folders import make_split_folder, make_strangers_folder, save_image
from PIL import Image

from datamodules import image_cache, make_data
from datamodules.checks import SharedError
from datamodules.folder import ANOTHER_ROOT, HELD_OUT, ImageFolder, hashed_share
from datamodules.image_cache import OR_SKIP
from datamodules.image_files import UnreadableImage
from reproduce import glow_photos, pictures, realnvp_photos
from reproduce.config import compose, override
from reproduce.schema import Schema
from results.runs import form


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache folder of a user whose files were not changed a moment ago."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image_cache, "UNSURE_SECONDS", -1.0)
    return tmp_path / "cache" / "paperflows"


@pytest.fixture
def lines(monkeypatch):
    """What a data set says about a folder."""
    said = []
    monkeypatch.setattr("datamodules.folder.rank_zero_info", said.append)
    return said


def ready(root, **arguments):
    data = make_data("folder", **{"seed": 0, "batch_size": 4, "size": 8, "root": root} | arguments)
    data.prepare_data()
    data.setup()
    return data


def refused(root, error=ValueError, **arguments):
    with pytest.raises(error) as caught:
        ready(root, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def images(data_set):
    return [data_set[0, k][0].tolist() for k in range(len(data_set))]


def split_names(data):
    """The names of the files of each split."""
    files = data._content.files
    return {
        split: [f.name for f in files if f.split == split] for split in ("train", "val", "test")
    }


# Splits


def test_subfolders_are_the_splits(tmp_path, cache):
    root = make_split_folder(tmp_path / "images", n_train=6, n_val=2, n_test=3)
    data = ready(root)
    expected = [save_image(tmp_path / "again.png", seed=seed) for seed in range(11)]
    expected = [pixels.transpose(2, 0, 1).tolist() for pixels in expected]
    assert images(data.train) == expected[:6]
    assert images(data.val) == expected[6:8]
    assert images(data.test) == expected[8:]
    assert (data.shape, data.n_bits, data.n_train) == ((3, 8, 8), 8, 6)


def test_without_subfolders_a_hash_of_the_name_divides(tmp_path, cache):
    root = tmp_path / "images"
    names = [f"a/{k}.png" for k in range(60)] + [f"b {k}.png" for k in range(60)]
    for name in names:
        save_image(root / name)
    data = ready(root)
    first = split_names(data)
    for split, (low, high) in HELD_OUT.items():
        assert first[split] == sorted(n for n in names if low <= hashed_share(n) < high)
        assert first[split]
    assert sorted(itertools.chain(*first.values())) == sorted(names)
    for k in range(20):
        save_image(root / f"new {k}.png")
    second = split_names(ready(root))
    moved = {split: set(first[split]) - set(second[split]) for split in first}
    assert moved == {"train": set(), "val": set(), "test": set()}


def test_the_shares_of_a_hashed_split():
    shares = [hashed_share(f"{k}.jpg") for k in range(20_000)]
    for low, high in HELD_OUT.values():
        assert np.mean([low <= share < high for share in shares]) == pytest.approx(0.05, abs=0.005)
    assert {high - low for low, high in HELD_OUT.values()} == {0.05}


def test_a_name_in_the_form_of_a_mac_is_in_the_same_split():
    composed = unicodedata.normalize("NFC", "Bär.png")
    decomposed = unicodedata.normalize("NFD", "Bär.png")
    assert composed != decomposed
    assert hashed_share(composed) == hashed_share(decomposed)
    assert image_cache.content_hash([composed], ["0"]) == image_cache.content_hash(
        [decomposed], ["0"]
    )


def test_names_in_the_form_of_a_mac_have_the_same_order_and_hash(tmp_path, cache):
    """In the two forms an accented letter sorts differently among other letters."""
    forms = {}
    for of_name in ("NFC", "NFD"):
        root = tmp_path / of_name
        for number, name in enumerate(("Bar", "Bär", "Bus", "Cent")):
            save_image(root / "train" / f"{unicodedata.normalize(of_name, name)}.png", seed=number)
        save_image(root / "val" / "a.png")
        save_image(root / "test" / "a.png")
        forms[of_name] = ready(root)
    assert forms["NFC"].content_hash == forms["NFD"].content_hash
    items = [[folder.train[0, k][0] for k in range(4)] for folder in forms.values()]
    assert all(map(torch.equal, *items))


@pytest.mark.parametrize("missing", [("val",), ("test",), ("val", "test")])
def test_a_missing_subfolder_is_held_out_from_train(tmp_path, cache, missing):
    root = make_split_folder(tmp_path / "images", n_train=80, n_val=3, n_test=3)
    for split in missing:
        shutil.rmtree(root / split)
    names = split_names(ready(root))
    for split in missing:
        low, high = HELD_OUT[split]
        inside = [f"{k:03}.png" for k in range(80) if low <= hashed_share(f"{k:03}.png") < high]
        assert names[split] == [f"train/{name}" for name in inside]
        assert inside
    for split in {"val", "test"} - set(missing):
        assert names[split] == [f"{split}/{k:03}.png" for k in range(3)]
    assert sum(map(len, names.values())) == 80 + 3 * (2 - len(missing))


def test_val_without_train_is_refused(tmp_path, cache):
    root = make_split_folder(tmp_path / "images", n_train=0, n_val=3, n_test=3)
    assert "has val/, but no train/: add it, or rename val/" in refused(root)


def test_splits_in_capitals_are_refused(tmp_path, cache):
    """Otherwise images of Test/ would be among those of training."""
    root = make_split_folder(tmp_path / "images", n_train=9, n_val=3, n_test=3)
    for split in ("train", "val", "test"):
        (root / split).rename(root / split.title())
    assert refused(root).endswith(
        "has Test/: rename it to test/, or to another name, if it is no split"
    )


def test_images_outside_the_subfolders_are_said(tmp_path, cache, lines):
    root = make_split_folder(tmp_path / "images", n_train=6, n_val=2, n_test=3)
    save_image(root / "valid" / "1.png")
    save_image(root / "0.png")
    assert ready(root).n_train == 6
    assert lines[0].startswith(f"{root}: 6 train, 2 val, 3 test images, sha256 ")
    assert lines[1:] == ["images outside train/, val/ and test/, which are not used: 2, as 0.png"]


def test_few_images_have_one_for_each_split(tmp_path, cache):
    """No name has a hash that chooses it."""
    root = tmp_path / "images"
    names = [name for name in (f"{k}.png" for k in range(20)) if hashed_share(name) >= 0.1][:7]
    for name in names:
        save_image(root / name)
    by_share = sorted(names, key=hashed_share)
    assert split_names(ready(root)) == {
        "train": sorted(by_share[1:-1]),
        "val": by_share[:1],
        "test": by_share[-1:],
    }


def test_too_few_images_are_one_line(tmp_path, cache):
    root = tmp_path / "images"
    save_image(root / "1.png")
    save_image(root / "2.png")
    assert refused(root) == (
        f"data.root={root} has 2 images, and none for train: add images, or divide them into "
        "train/, val/ and test/"
    )
    save_image(root / "3.png")
    assert refused(root) == "data.batch_size=4 does not fit the 1 training items: give 1 to 1"
    make_split_folder(root, n_train=3, n_val=1, n_test=1)
    assert refused(root) == "data.batch_size=4 does not fit the 3 training items: give 1 to 3"
    assert not cache.exists()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_empty_or_missing_folder_is_one_line(tmp_path, cache, batch_size):
    (tmp_path / "empty").mkdir()
    assert "contains no .png" in refused(tmp_path / "empty", batch_size=batch_size)
    message = refused(tmp_path / "nothing", FileNotFoundError, batch_size=batch_size)
    assert message == f"there is no folder {tmp_path / 'nothing'}: {ANOTHER_ROOT}"
    assert refused(None) == f"data.root is missing: {ANOTHER_ROOT}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 2}, "data.channels=2: give 1 for grey images, or 3 for colour"),
        ({"size": 2.5}, "data.size=2.5 is out of range: give a whole number from 1 to 4096"),
        ({"size": 0}, "data.size=0 is out of range: give a whole number from 1 to 4096"),
        ({"size": [8, 5000]}, "data.size=5000 is out of range: give a whole number from 1 to 4096"),
        ({"size": [8]}, "data.size=[8]: give one side, or [height,width]"),
        ({"size": [1, 2, 3]}, "data.size=[1, 2, 3]: give one side, or [height,width]"),
    ],
)
def test_impossible_settings_are_one_line(tmp_path, settings, message):
    assert refused(tmp_path, **settings) == message


# Classes


def make_classes(root, counts, inside=("train", "val", "test")):
    for split in inside:
        for name, n in counts.items():
            for k in range(n):
                save_image(root / split / name / f"{k}.png", seed=k)


def test_folders_are_classes(tmp_path, cache):
    root = tmp_path / "images"
    make_classes(root, {"dog": 2, "cat/big": 1, "cat/small": 2})
    (root / "train" / ".hidden").mkdir()
    data = ImageFolder(root, batch_size=4, size=8, labels=True)
    assert (data.class_names, data.n_classes) == (("cat", "dog"), 2)  # before any file is read
    data.setup()
    for part in (data.train, data.val, data.test):
        assert [part[0, k][2] for k in range(5)] == [0, 0, 0, 1, 1]
    assert [len(item) for item in (ready(root).train[0, 0], data.train[0, 0])] == [2, 3]
    assert ready(root).class_names is None


def test_classes_without_splits(tmp_path, cache):
    root = tmp_path / "images"
    make_classes(root, {"Bär": 60, "Ähre": 60}, inside=(".",))
    data = ready(root, labels=True)
    assert data.class_names == ("Bär", "Ähre")
    names = split_names(data)
    for split, part in (("train", data.train), ("val", data.val), ("test", data.test)):
        expected = [data.class_names.index(name.split("/")[0]) for name in names[split]]
        assert [part[0, k][2] for k in range(len(part))] == expected


def test_an_image_outside_the_classes_is_named(tmp_path, cache):
    root = tmp_path / "images"
    make_classes(root, {"cat": 4, "dog": 4})
    save_image(root / "val" / "0.png")
    assert f"labels=true, and {root}/val/0.png is in no folder of a class" in refused(
        root, labels=True
    )
    (root / "val" / "0.png").unlink()
    save_image(root / "test" / "zebra" / "0.png")
    assert f"{root}/test/zebra/0.png is of the class zebra, which has no folder in train/" in (
        refused(root, labels=True)
    )
    assert ready(root).n_train == 8


def test_a_class_without_images_is_named(tmp_path, cache):
    root = tmp_path / "images"
    make_classes(root, {"cat": 4, "dog": 4})
    (root / "train" / "bird").mkdir()
    assert "the class bird has no training images" in refused(root, labels=True)


def test_no_classes_are_one_line(tmp_path, cache):
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)
    message = refused(root, labels=True)
    assert f"needs a folder of images for each class in {root}/train" in message
    assert refused(tmp_path / "no", FileNotFoundError, labels=True).startswith("there is no folder")


# Sizes, channels, crops, flips


def test_images_of_any_size_and_kind(tmp_path, cache):
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)
    save_image(root / "train" / "a.jpg", height=100, width=30)
    save_image(root / "train" / "b.webp", height=3, width=1, channels=1)
    save_image(root / "train" / "c.bmp", height=9, width=500)
    for channels in (1, 3):
        data = ready(root, channels=channels, size=[6, 10])
        assert data.shape == (channels, 6, 10)
        shapes = {tuple(data.train[0, k][0].shape) for k in range(7)}
        assert shapes == {(channels, 6, 10)}


def test_bits_are_the_most_significant_ones(tmp_path, cache):
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)
    whole = np.array(images(ready(root).train))
    assert images(ready(root, n_bits=5).train) == (whole >> 3).tolist()


def test_flips_are_in_training_only(tmp_path, cache):
    root = make_split_folder(tmp_path / "images", n_train=40, n_val=9, n_test=9)
    plain = ready(root)
    data = ready(root, hflip=True)
    mirrored = [torch.equal(data.train[1, k][0], plain.train[0, k][0].flip(-1)) for k in range(40)]
    assert 10 < sum(mirrored) < 30
    assert images(data.val) == images(plain.val)
    assert images(data.test) == images(plain.test)


def columns(width):
    """An image whose column k has the level k."""
    return Image.fromarray(np.repeat(np.arange(width, dtype=np.uint8)[None], 8, axis=0))


def make_wide(root, n_train=40):
    for split, n in (("train", n_train), ("val", 2), ("test", 2)):
        (root / split).mkdir(parents=True)
        for k in range(n):
            columns(20).save(root / split / f"{k:02}.png")
        columns(20).transpose(Image.Transpose.TRANSPOSE).save(root / split / "tall.png")
    return root


def lefts(data_set, epoch, n=40):
    """The position of each crop of the columns."""
    return [int(data_set[epoch, k][0][0, 0, 0]) for k in range(n)]


def test_random_crops_are_a_function_of_seed_epoch_and_index(tmp_path, cache):
    root = make_wide(tmp_path / "images")
    arguments = {"channels": 1, "random_crop": True}
    data = ready(root, **arguments)
    positions = lefts(data.train, epoch=3)
    assert set(positions) <= set(range(13))
    assert len(set(positions)) > 8
    crop = data.train[3, 0][0]
    assert crop[0].tolist() == [list(range(positions[0], positions[0] + 8))] * 8
    assert data.train[3, 40][0].shape == (1, 8, 8)  # tall.png
    again = ready(root, **arguments)
    assert [lefts(again.train, 0), lefts(again.train, 3)] == [lefts(data.train, 0), positions]
    assert lefts(data.train, 3) != lefts(data.train, 4)
    assert lefts(ready(root, seed=1, **arguments).train, 3) != positions
    assert positions[:6] == [0, 3, 1, 10, 1, 3]  # resumed runs rely on this stream


def test_crops_of_evaluation_are_in_the_middle(tmp_path, cache):
    root = make_wide(tmp_path / "images", n_train=4)
    plain = ready(root, channels=1)
    data = ready(root, channels=1, random_crop=True)
    assert lefts(plain.train, 0, n=4) == [6] * 4
    assert lefts(data.val, 5, n=2) == [6] * 2
    assert images(data.val) == images(plain.val)
    assert images(data.test) == images(plain.test)
    assert data.content_hash == plain.content_hash
    assert lefts(data.unaugmented("train"), 0, n=4) == [6] * 4  # FID's reference
    assert images(data.unaugmented("train")) == images(plain.train)


def test_a_copy_for_another_process_opens_the_file_itself(tmp_path, cache):
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1, height=64, width=64)
    data = ready(root, size=64)
    expected = images(data.train)
    content = pickle.dumps(data.train)
    assert len(content) < 4 * 3 * 64 * 64  # fewer bytes than the pixels have
    assert images(pickle.loads(content)) == expected


# Files that cannot be used


def make_with_wrong_files(root):
    """Six training images, of which three cannot be read."""
    make_split_folder(root, n_train=6, n_val=1, n_test=1)
    (root / "train" / "001.png").write_bytes(b"")
    (root / "train" / "002.png").write_bytes((root / "train" / "000.png").read_bytes()[:-90])
    (root / "train" / "004.png").write_bytes(b"GIF89a")
    return root


def test_a_file_that_cannot_be_read_ends_the_run(tmp_path, cache):
    root = make_with_wrong_files(tmp_path / "images")
    expected = f"{root}/train/001.png is empty; {OR_SKIP}"
    assert refused(root, UnreadableImage, batch_size=2) == expected
    assert list(cache.glob("*.pixels")) == list(cache.glob("*.part")) == []


def test_files_that_cannot_be_read_can_be_skipped(tmp_path, cache, lines):
    root = make_with_wrong_files(tmp_path / "images")
    for _ in range(2):  # decoded, and then from the cache
        lines.clear()
        data = ready(root, skip_unreadable=True, batch_size=2)
        kept = [save_image(tmp_path / "again.png", seed=seed) for seed in (0, 3, 5)]
        assert images(data.train) == [pixels.transpose(2, 0, 1).tolist() for pixels in kept]
        assert lines[1:] == [
            "files that cannot be read and are left out: 3",
            f"  {root}/train/001.png is empty",
            f"  {root}/train/002.png cannot be read: image file is truncated",
            f"  {root}/train/004.png is a GIF, and not one of PNG, JPEG, WebP, BMP and TIFF",
        ]
    expected = f"{root}/train/001.png is empty; {OR_SKIP}"
    assert refused(root, UnreadableImage, batch_size=2) == expected
    message = refused(root, skip_unreadable=True, batch_size=4)
    assert message == "data.batch_size=4 does not fit the 3 training items: give 1 to 3"


def test_only_ten_of_many_files_are_named(tmp_path, cache, lines):
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)
    for k in range(30):
        (root / "train" / f"broken {k}.png").write_bytes(b"")
    ready(root, skip_unreadable=True)
    assert len(lines) == 13
    assert lines[-1] == "  and 20 more"


def test_a_file_that_must_not_be_read_is_named(tmp_path, cache, monkeypatch):
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)
    opened = Path.open

    def refuse(path, *arguments, **keywords):  # chmod does not keep root out
        if path.name == "002.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", refuse)
    message = refused(root, UnreadableImage)
    assert message == f"{root}/train/002.png cannot be read: Permission denied; {OR_SKIP}"
    assert ready(root, skip_unreadable=True, batch_size=3).n_train == 3


def test_transparent_and_small_images_are_said_once(tmp_path, cache, lines):
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(root / "train" / "a.png")
    save_image(root / "train" / "b.png", height=4, width=50)
    data = ready(root)
    assert lines[1:] == [
        "images with transparent pixels, which are now on white: 1",
        "images that are smaller than 8x8 and are enlarged: 1",
    ]
    assert data.train[0, 4][0].min() == 255
    data.setup()  # as before the test
    assert len(lines) == 3


# The hash of the content


def test_the_hash_is_that_of_sha256sum(tmp_path, cache):
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)
    text = ""
    for path in sorted(root.rglob("*.png")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        text += f"{digest}  {path.relative_to(root)}\n"
    assert ready(root).content_hash == hashlib.sha256(text.encode()).hexdigest()


def test_the_hash_depends_on_names_and_bytes_alone(tmp_path, cache):
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)
    first = ready(root).content_hash
    copy = shutil.copytree(root, tmp_path / "copy")
    assert ready(copy, size=4, channels=1).content_hash == first
    (copy / "notes.txt").write_text("no image")
    assert ready(copy).content_hash == first
    (copy / "train" / "000.png").rename(copy / "train" / "0.png")
    renamed = ready(copy).content_hash
    (copy / "train" / "0.png").write_bytes((copy / "train" / "001.png").read_bytes())
    assert len({first, renamed, ready(copy).content_hash}) == 3


def count_reads(monkeypatch):
    """The names of the files whose sha256 is computed from now on."""
    names = []
    compute = image_cache._sha256
    monkeypatch.setattr(
        image_cache, "_sha256", lambda path: (names.append(path.name), compute(path))[1]
    )
    return names


def test_only_files_that_have_changed_are_read_again(tmp_path, cache, monkeypatch):
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)
    read = count_reads(monkeypatch)
    first = ready(root).content_hash
    assert len(read) == 6
    read.clear()
    assert ready(root).content_hash == first
    assert read == []
    save_image(root / "train" / "002.png", seed=99)
    assert ready(root).content_hash != first
    assert read == ["002.png"]


def test_a_file_of_the_same_size_and_date_is_noticed(tmp_path, cache):
    """As `cp -p` leaves it; the time of the change of its attributes is another one."""
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)
    for k in range(4):
        Image.new("L", (8, 8), k).save(root / "train" / f"{k:03}.bmp")
    first = ready(root).content_hash
    path = root / "train" / "000.bmp"
    before = path.stat()
    Image.new("L", (8, 8), 100).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert ready(root).content_hash != first


def test_a_file_that_has_just_changed_is_read_again(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(image_cache, "UNSURE_SECONDS", 60.0)
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)
    read = count_reads(monkeypatch)
    ready(root)
    ready(root)
    assert len(read) == 12


# The cache


def made(cache):
    return sorted(path.name for path in cache.iterdir())


def test_images_are_decoded_once(tmp_path, cache, monkeypatch):
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)
    first = ready(root)
    expected = images(first.train)
    monkeypatch.setattr(image_cache, "read_pixels", None)  # would raise
    assert images(ready(root).train) == expected
    assert images(ready(root, seed=3, batch_size=2, n_bits=8).train) == expected
    copy = shutil.copytree(root, tmp_path / "copy")
    assert images(ready(copy).train) == expected
    assert [Path(name).suffix for name in made(cache)].count(".pixels") == 1


def test_other_settings_have_another_cache(tmp_path, cache):
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)
    for settings in ({}, {"channels": 1}, {"size": [8, 4]}, {"random_crop": True}):
        ready(root, **settings)
    names = [name for name in made(cache) if name.endswith(".pixels")]
    assert sorted(name.split("-")[0] for name in names) == ["1x8x8", "3x8x4", "3x8x8", "3x8x8"]


def test_the_cache_is_a_key(tmp_path, cache, monkeypatch):
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)
    ready(root, cache=tmp_path / "mine")
    assert not cache.exists()
    assert made(tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    ready(root, cache="~/other")
    assert made(tmp_path / "other")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert ImageFolder(root, 4).cache == tmp_path / ".cache" / "paperflows"


def test_a_damaged_cache_is_made_again(tmp_path, cache):
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)
    expected = images(ready(root).train)
    [pixels] = cache.glob("*.pixels")
    [record] = cache.glob("*.json")
    [index] = cache.glob("*.files")
    for path in (pixels, record, index):
        for content in (b"", b"[1", b"[]", b"{}", path.read_bytes()[:-1]):
            path.write_bytes(content)
            assert images(ready(root).train) == expected
        path.unlink()
        assert images(ready(root).train) == expected


def test_a_cache_with_other_pixels_is_made_again(tmp_path, cache, monkeypatch):
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)
    expected = images(ready(root).train)
    [pixels] = cache.glob("*.pixels")
    content = bytearray(pixels.read_bytes())
    content[len(content) // 2] ^= 1
    pixels.write_bytes(content)
    assert images(ready(root).train) == expected
    os.utime(pixels)  # as after a copy: the content counts
    monkeypatch.setattr(image_cache, "_make", None)
    assert images(ready(root).train) == expected


def test_a_run_that_is_killed_leaves_no_cache(tmp_path, cache, monkeypatch):
    """The names of the files appear only when they are complete; old parts are removed."""
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)

    def kill(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", kill)
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
        with pytest.raises(KeyboardInterrupt):
            ready(root)
    [part] = cache.glob("*.part")
    assert list(cache.glob("*.pixels")) == []
    ready(root)
    assert part.exists()  # it may be of a run that goes on
    os.utime(part, (0, 0))
    ready(root, channels=1)
    assert not part.exists()


def test_two_runs_that_decode_at_once_do_not_hurt_each_other(tmp_path, cache, monkeypatch):
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)
    write = image_cache._write_pixels
    others = []

    def write_after_another(*arguments):
        if not others:
            others.append(None)
            others[0] = images(ready(root).train)
            others.extend(path.stat().st_ino for path in cache.glob("*.pixels"))
        return write(*arguments)

    monkeypatch.setattr(image_cache, "_write_pixels", write_after_another)
    assert images(ready(root).train) == others[0]
    # The first file stays: on a network's file system, replacing it would end the other run.
    assert [path.stat().st_ino for path in cache.glob("*.pixels")] == others[1:]
    assert list(cache.glob("*.part")) == []


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, cache, monkeypatch):
    """A folder to which files are still being copied."""
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)
    fsync = os.fsync

    def change_a_file(number):
        save_image(root / "train" / "002.png", height=9)
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", change_a_file)
        assert refused(root) == f"{root}/train/002.png has changed while it was read: start again"
    assert list(cache.glob("*.p*")) == []
    assert ready(root).n_train == 4


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, cache, monkeypatch):
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)
    (tmp_path / "file").write_text("")
    message = refused(root, cache=tmp_path / "file")
    assert message.startswith(f"data.cache={tmp_path}/file cannot be used: File exists: give a")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "cannot be used: No space left on device: give a folder" in refused(root)
    assert list(cache.glob("*.p*")) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1, free=100))
    message = refused(root)
    assert "has 0.0 GB left, and 6 images take 0.0 GB: give another folder, or a smaller" in message


def test_a_cache_that_is_read_only_but_complete_is_used(tmp_path, cache, monkeypatch):
    root = make_split_folder(tmp_path / "images", n_train=4, n_val=1, n_test=1)
    expected = images(ready(root).train)
    for index in cache.glob("*.files"):
        index.unlink()

    def refuse(path, *arguments, **keywords):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert images(ready(root).train) == expected


# Runs

RUN = ["logger.name=none", "trainer.accelerator=cpu", "trainer.max_steps=2", "samples.n=2"]
RUN += ["data.batch_size=4", "trainer.precision=32-true", "data.name=folder"]
RUN += ["trainer.val_check_interval=2", "samples.every_n_steps=2", "checkpoint.every_n_steps=2"]
REALNVP = ["flow.hidden_channels=4", "flow.n_blocks=1", "eval.bn_images=8"]
GLOW = ["flow.n_levels=2", "flow.depth=1", "flow.hidden_channels=4"]
COLOUR = ["data.size=[48,64]"]
GREY = ["data.size=16", "data.channels=1"]
OF_RECIPES = {
    "realnvp_cifar10": [*REALNVP, *GREY],
    "realnvp_photos": [*REALNVP, *COLOUR],
    "glow_cifar10": [*GLOW, *GREY],
    "glow_photos": [*GLOW, *COLOUR, "data.random_crop=true", "data.hflip=true"],
}


def finished(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("recipe", OF_RECIPES)
def test_recipes_train_on_it_without_the_row_of_the_paper(tmp_path, cache, recipe):
    script = import_module(f"reproduce.{recipe}")
    root = make_split_folder(tmp_path / "my images", n_train=9, n_val=2, n_test=3, width=11)
    folder = tmp_path / "run"
    script.main([*RUN, *OF_RECIPES[recipe], f"data.root={root}", f"run_dir={folder}"])
    result = finished(folder)
    assert (result["images"], result["n_train"]) == (8, 9)
    assert 0 < result["metrics"]["test/bpd"] < 20
    assert result["data"] == {
        "sha256": ready(root).content_hash,
        "n_images": {"train": 9, "val": 2, "test": 3},
    }
    assert not any(claim["comparable"] for claim in result["papers"])
    assert (result["gap"], result["status"]) == (None, "-")
    assert form(result) == []
    assert list((folder / "samples").glob("*.png"))


def test_wrong_files_do_not_cost_a_strangers_run(tmp_path, cache, caplog, recwarn):
    root = make_strangers_folder(tmp_path / "Meine Bilder", n=60)
    run = tmp_path / "run"
    words = [*RUN, *GLOW, f"data.root={root}", "data.size=16", f"run_dir={run}"]
    words = override(words, ["data.skip_unreadable=true", "logger.name=csv"])
    glow_photos.main(words)
    result = finished(run)
    assert result["data"]["n_images"] == {"train": 63, "val": 1, "test": 6, "unreadable": 9}
    assert 0 < result["metrics"]["test/bpd"] < 20
    named = [line for line in caplog.messages if line.startswith(f"  {root}/wrong/")]
    assert len(named) == 9
    assert not [warning for warning in recwarn if "logging interval" in str(warning.message)]


def test_pictures_of_a_run_without_classes(tmp_path, cache):
    root = make_split_folder(tmp_path / "images", n_train=5, n_val=2, n_test=3, channels=1)
    run = tmp_path / "run"
    glow_photos.main([*RUN, *GLOW, *GREY, f"data.root={root}", f"run_dir={run}"])
    root.rename(tmp_path / "moved")
    pictures.main([str(run), "n=2", f"data.root={tmp_path / 'moved'}"])
    names = sorted(path.name for path in (run / "pictures").iterdir())
    assert names == ["interpolation.png", "levels.png", "temperature.png"]


def test_a_flow_with_classes_trains_on_class_folders(tmp_path, cache):
    root = tmp_path / "images"
    make_classes(root, {"cat": 4, "dog": 4})
    words = [*RUN, *GLOW, f"data.root={root}", "data.labels=true", f"run_dir={tmp_path / 'run'}"]
    words += ["data.size=8", "flow.n_classes=2"]
    script = import_module("reproduce.glow_cifar10_conditional")
    script.main(words)
    assert finished(tmp_path / "run")["metrics"]["test/accuracy"] >= 0
    words[words.index("flow.n_classes=2")] = "flow.n_classes=10"
    words[words.index(f"run_dir={tmp_path / 'run'}")] = f"run_dir={tmp_path / 'other'}"
    with pytest.raises(SystemExit) as stop:
        script.main(words)
    assert "ImageFolder has 2: give flow.n_classes=2" in stop.value.code


def test_a_mistake_ends_a_run_with_one_line_and_leaves_no_folder(tmp_path, cache):
    words = [*RUN, *REALNVP, "data.size=8", f"run_dir={tmp_path / 'run'}"]

    def answer(*more):
        with pytest.raises(SystemExit) as stop:
            realnvp_photos.main([*words, *more])
        assert "\n" not in stop.value.code
        assert not (tmp_path / "run").exists()
        return stop.value.code

    root = make_with_wrong_files(tmp_path / "images")
    assert answer() == f"error: data.root is missing: {ANOTHER_ROOT}"
    assert answer(f"data.root={root}") == f"error: {root}/train/001.png is empty; {OR_SKIP}"
    assert (
        answer(f"data.root={tmp_path}/no")
        == f"error: there is no folder {tmp_path}/no: {ANOTHER_ROOT}"
    )
    few = answer(f"data.root={root}", "data.skip_unreadable=true")
    assert few == "error: data.batch_size=4 does not fit the 3 training items: give 1 to 3"


def test_a_run_does_not_continue_on_other_images(tmp_path, cache):
    root = make_split_folder(tmp_path / "images", n_train=8, n_val=2, n_test=2)
    words = [*RUN, *REALNVP, "data.size=8", f"run_dir={tmp_path / 'run'}"]
    realnvp_photos.main([*words, f"data.root={root}"])
    (tmp_path / "run" / "result.json").unlink()  # it was killed before its test
    more = [*words, "resume=auto", f"data.cache={tmp_path / 'elsewhere'}"]
    more[more.index("trainer.max_steps=2")] = "trainer.max_steps=4"
    copy = shutil.copytree(root, tmp_path / "copy")
    save_image(copy / "train" / "new.png")
    with pytest.raises(SystemExit) as stop:
        realnvp_photos.main([*more, f"data.root={copy}"])
    assert f"error: data.root={copy} has other images than when this run began" in stop.value.code
    (copy / "train" / "new.png").unlink()
    realnvp_photos.main([*more, f"data.root={copy}"])
    assert finished(tmp_path / "run")["images"] == 16


def test_a_finished_run_says_if_other_images_are_given(tmp_path, cache):
    root = make_split_folder(tmp_path / "images", n_train=8, n_val=2, n_test=2)
    words = [*RUN, *REALNVP, "data.size=8", f"run_dir={tmp_path / 'run'}"]
    realnvp_photos.main([*words, f"data.root={root}"])
    copy = shutil.copytree(root, tmp_path / "copy")

    def answer():
        with pytest.raises(SystemExit) as stop:
            realnvp_photos.main([*words, f"data.root={copy}", "resume=auto"])
        return stop.value.code

    assert answer() == 0
    save_image(copy / "train" / "new.png")
    assert (
        f"is finished, and was trained on other images than those in data.root={copy}" in answer()
    )


def test_all_processes_end_if_one_has_other_images(tmp_path, cache, monkeypatch):
    """Only the process with other images would refuse to go on, and the others wait for it."""
    root = make_split_folder(tmp_path / "images", n_train=8, n_val=2, n_test=2)
    own = ready(root).content_hash
    hashes = [own, own]

    def gather(texts, own):
        texts[:] = hashes if own else [None, None]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert ready(root).content_hash == own
    hashes[1] = "0"
    with pytest.raises(SharedError, match=f"different images in data.root .*0 and {own}"):
        ready(root)


def test_recipes_take_its_keys():
    for recipe in OF_RECIPES:
        config = compose(recipe, ["data.name=folder", "data.size=[48,64]", "data.root=~/a b"])
        assert (config.data.name, list(config.data.size)) == ("folder", [48, 64])
        schema = Schema(recipe)
        schema.use_data("folder")
        assert schema.kind("data.size").read("64") == 64
        assert schema.kind("data.root").read("20261127") == "20261127"
        assert schema.kind("data.cache").read("null") is None
