"""MNIST and Fashion-MNIST from idx files, which the tests make themselves."""

import gzip
import json
import urllib.error
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import idx, make_official, write

from datamodules import DATA, make_data, mnist
from datamodules.mnist import MNIST, FashionMNIST
from reproduce import realnvp_cifar10
from reproduce.config import CONFIGS, compose
from reproduce.schema import Schema

REAL = Path(__file__).resolve().parent.parent / "data"
NAMES = ["mnist", "fashion_mnist"]
FOLDERS = [("mnist", "MNIST/raw"), ("fashion_mnist", "FashionMNIST/raw")]
DOWNLOAD = "torchvision.datasets.utils.download_url"
IMAGES = "train-images-idx3-ubyte"


@pytest.fixture
def files(monkeypatch):
    """Small files; `last10000` holds out their last 10 images."""
    monkeypatch.setattr(mnist, "N_LAST", 10)
    return make_official(monkeypatch, 60, 20)


def pack(folder):
    """Replace all files of a folder by packed ones."""
    for path in list(folder.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def ready(root, name="mnist", **arguments):
    keywords = {"seed": 0, "batch_size": 4, "n_val": 10, "download": False, "root": root}
    data = make_data(name, **(keywords | arguments))
    data.prepare_data()
    data.setup()
    return data


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def rows(images):
    return [image.tobytes() for image in images]


@pytest.mark.parametrize(
    ("name", "folder"), [*FOLDERS, *((name, name) for name in NAMES), ("mnist", ".")]
)
@pytest.mark.parametrize("packed", [False, True])
def test_pixels_and_classes_arrive_where_they_belong(tmp_path, files, name, folder, packed):
    write(tmp_path / folder, files.contents)
    if packed:
        pack(tmp_path / folder)
    data = ready(tmp_path, name, n_val=0, labels=True)
    assert (data.shape, data.n_bits, data.n_train) == ((1, 28, 28), 8, 60)
    assert np.array_equal(data.train.images, files.train[:, None])
    assert np.array_equal(data.test.images, files.test[:, None])
    images, indices, labels = next(iter(data.test_dataloader()))
    assert (images.dtype, images.shape) == (torch.uint8, (4, 1, 28, 28))
    assert np.array_equal(images[:, 0], files.test[:4])
    assert labels.tolist() == files.test_labels[:4].tolist()
    assert indices.tolist() == [0, 1, 2, 3]
    assert len(data.val) == 0
    assert data.val_dataloader() == []


def test_classes_have_names():
    assert (MNIST.n_classes, MNIST.class_names) == (10, tuple("0123456789"))
    assert (FashionMNIST.n_classes, len(FashionMNIST.class_names)) == (10, 10)
    assert [FashionMNIST.class_names[i] for i in (0, 5, 9)] == [
        "T-shirt/top",
        "Sandal",
        "Ankle boot",
    ]


def test_the_last_images_are_held_out(tmp_path, files):
    write(tmp_path, files.contents)
    data = ready(tmp_path, split="last10000", labels=True)
    assert np.array_equal(data.train.images, files.train[:50, None])
    assert np.array_equal(data.val.images, files.train[50:, None])
    assert data.val.labels.tolist() == files.train_labels[50:].tolist()
    assert ready(tmp_path, split="last10000", n_val=0).n_train == 60
    for n_val in (9, 11):
        with pytest.raises(ValueError, match=rf"data\.n_val={n_val}: give data\.n_val=10") as error:
            ready(tmp_path, split="last10000", n_val=n_val)
        one_line(error)


def test_the_random_split_is_that_of_cifar(tmp_path, files):
    write(tmp_path, files.contents)
    data = ready(tmp_path, seed=3)
    val = sorted(np.random.default_rng(0).permutation(60)[:10])
    assert np.array_equal(data.val.images, files.train[val][:, None])
    assert sorted(rows(data.train.images) + rows(data.val.images)) == sorted(rows(files.train))
    assert np.array_equal(ready(tmp_path).train.images, data.train.images)  # of another seed


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"data\.split=first .* give one of random, last10000"):
        MNIST("data", 8, split="first")


def test_bits_flips_and_shifts_are_as_in_other_images(tmp_path, files):
    write(tmp_path, files.contents)
    data = ready(tmp_path, n_bits=5, n_val=0)
    assert (data.n_bits, data.dequantizer.n_bits, data.hflip) == (5, 5, False)
    assert all(np.array_equal(data.train[1, i][0][0], files.train[i] // 8) for i in range(60))
    flipped = ready(tmp_path, hflip=True, n_val=0).train
    mirrored = [np.array_equal(flipped[0, i][0][0], files.train[i][:, ::-1]) for i in range(60)]
    assert 15 < sum(mirrored) < 45
    shifted = ready(tmp_path, shift=0.1, n_val=0).train
    assert not np.array_equal(shifted[0, 0][0][0], files.train[0])


# Files that are missing or damaged


@pytest.mark.parametrize(("name", "folder"), FOLDERS)
def test_missing_files_are_named_with_their_place(tmp_path, files, name, folder):
    root = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match=r"data\.download=true") as error:
        ready(root, name)
    message = one_line(error)
    assert all(f"{file}.gz" in message for file in files.contents)
    assert f"into {root / folder}/" in message
    assert not root.exists()
    write(tmp_path, files.contents)
    (tmp_path / IMAGES).unlink()
    with pytest.raises(FileNotFoundError, match=f"put {IMAGES}.gz \\(packed or not"):
        ready(tmp_path, name)
    with pytest.raises(FileNotFoundError, match=f"put {IMAGES}.gz \\(packed or not"):
        make_data(name, seed=0, batch_size=4, root=tmp_path).setup()  # of another process


def changed(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("change", "ending", "reason"),
    [
        (lambda content: content[:1000], "", "it has 1,000 bytes, not the 47,056 of its header"),
        (lambda content: content[:7], "", "it has 7 bytes, fewer than its header"),
        (lambda content: b"", "", "its magic number is 0, not 2051"),
        (lambda content: content + b"x", "", "it has 47,057 bytes, not the 47,056 of its header"),
        (lambda content: idx(np.zeros(60)), "", "its magic number is 2049, not 2051"),
        (changed, "", "its content does not have the official md5"),
        (
            lambda content: gzip.compress(changed(content)),
            ".gz",
            "its content does not have the official md5",
        ),
        (lambda content: gzip.compress(content)[:1000], ".gz", "it cannot be unpacked: Compressed"),
        (lambda content: content, ".gz", "it cannot be unpacked: Not a gzipped file"),
        (
            lambda content: b"\x1f\x8b\x08" + b"\0" * 7 + b"\xff" * 99,
            ".gz",
            "it cannot be unpacked",
        ),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, files, change, ending, reason):
    write(tmp_path, files.contents)
    (tmp_path / IMAGES).unlink()
    path = tmp_path / f"{IMAGES}{ending}"
    path.write_bytes(change(files.contents[IMAGES]))
    with pytest.raises(ValueError, match="damaged or another file") as error:
        ready(tmp_path)
    message = one_line(error)
    assert message.startswith(f"{path} is damaged")
    assert reason in message
    assert "delete it and put the official file there (data.download=true fetches it)" in message


# Downloads


def test_missing_files_are_downloaded(tmp_path, files, monkeypatch):
    addresses = []

    def download(url, root, filename):
        addresses.append(url)
        name = url.rpartition("/")[2].removesuffix(".gz")
        Path(root, filename).write_bytes(gzip.compress(files.contents[name]))

    monkeypatch.setattr(DOWNLOAD, download)
    folder = tmp_path / "MNIST" / "raw"
    write(folder, {IMAGES: files.contents[IMAGES]})
    data = ready(tmp_path, download=True)
    assert np.array_equal(data.test.images, files.test[:, None])
    others = [name for name in files.contents if name != IMAGES]
    assert addresses == [f"{MNIST.url}{name}.gz" for name in others]
    assert {path.name for path in folder.iterdir()} == {IMAGES, *(f"{n}.gz" for n in others)}
    ready(tmp_path, download=True)
    assert len(addresses) == 3  # complete files need no network


def test_a_broken_download_does_not_block_the_next(tmp_path, files, monkeypatch):
    def broken(url, root, filename):
        assert not Path(root, filename).exists()  # torchvision would keep it
        Path(root, filename).write_bytes(b"half a file")
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(DOWNLOAD, broken)
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="could not be downloaded") as error:
            ready(tmp_path, "fashion_mnist", download=True)
        message = one_line(error)
        assert "Temporary failure in name resolution" in message
        assert f"any mirror's copy) into {tmp_path / 'FashionMNIST' / 'raw'}/" in message
    monkeypatch.setattr(
        DOWNLOAD, lambda url, root, filename: Path(root, filename).write_bytes(b"<html>")
    )
    with pytest.raises(ValueError, match="it cannot be unpacked: Not a gzipped file"):
        ready(tmp_path, "fashion_mnist", download=True)
    write(tmp_path / "FashionMNIST" / "raw", files.contents)
    assert np.array_equal(ready(tmp_path, "fashion_mnist").test.images, files.test[:, None])


# Recipes

RUN = ["logger.name=none", "trainer.accelerator=cpu", "trainer.max_steps=2", "samples.n=2"]
RUN += ["data.download=false", "data.batch_size=4", "data.n_val=10", "trainer.precision=32-true"]
RUN += ["trainer.val_check_interval=2", "samples.every_n_steps=2", "checkpoint.every_n_steps=2"]
REALNVP = ["flow.hidden_channels=4", "flow.n_blocks=1", "eval.bn_images=8"]
RECIPES = {path.stem for path in CONFIGS.glob("*_*.yaml")} - {"realnvp_moons"}
RECIPES = {recipe for recipe in RECIPES if not recipe.startswith(("srflow_", "rrdb_"))}
GLOW = ["flow.n_levels=2", "flow.depth=1", "flow.hidden_channels=4"]


OF_RECIPES = {
    "realnvp_cifar10": ["data.name=mnist", "flow.n_scales=3", *REALNVP],
    "realnvp_photos": ["data.name=fashion_mnist", "data.split=last10000", *REALNVP],
    "glow_cifar10": ["data.name=mnist", "data.split=last10000", *GLOW],
    "glow_cifar10_modern": [
        *("data.name=fashion_mnist", "optim.warmup_steps=1", "optim.cooldown_steps=1", *GLOW)
    ],
    "glow_cifar10_additive5bit": ["data.name=mnist", "data.n_bits=5", *GLOW],
    "glow_cifar10_conditional": ["data.name=mnist", "data.labels=true", *GLOW],
    "glow_photos": ["data.name=fashion_mnist", *GLOW],
}


def test_no_recipe_of_images_is_left_out():
    assert set(OF_RECIPES) == RECIPES


@pytest.mark.parametrize("recipe", OF_RECIPES)
def test_a_recipe_trains_on_it_without_the_row_of_the_paper(tmp_path, files, recipe):
    script = import_module(f"reproduce.{recipe}")
    words = OF_RECIPES[recipe]
    write(tmp_path / "data", files.contents)
    folder = tmp_path / "run"
    script.main([*RUN, *words, f"data.root={tmp_path / 'data'}", f"run_dir={folder}"])
    result = json.loads((folder / "result.json").read_text())
    assert result["images"] == 8
    assert result["n_train"] == 50
    assert 0 < result["metrics"]["test/bpd"] < 20
    assert not any(claim["comparable"] for claim in result["papers"])
    assert (result["gap"], result["status"]) == (None, "-")
    assert list((folder / "samples").glob("*.png"))


def test_a_mistake_ends_a_run_with_one_line(tmp_path, files):
    words = [*RUN, *REALNVP, "data.name=mnist", f"run_dir={tmp_path / 'run'}"]
    words.append(f"data.root={tmp_path}")
    with pytest.raises(SystemExit) as stop:
        realnvp_cifar10.main(words)
    assert stop.value.code.startswith(f"error: MNIST is not complete in data.root={tmp_path}: put")
    with pytest.raises(SystemExit) as stop:
        realnvp_cifar10.main([*words, "flow.n_scales=4"])
    assert "halves a 28x28 image to odd sizes: give at most flow.n_scales=3, or" in stop.value.code
    with pytest.raises(SystemExit) as stop:
        realnvp_cifar10.main([*words, "data.split=first10000"])
    assert "give one of random, last10000" in stop.value.code


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_of_images_takes_its_keys(name):
    for recipe in RECIPES:
        config = compose(recipe, [f"data.name={name}"])
        assert (config.data.name, config.data.n_val, config.data.hflip) == (name, 10_000, False)
        schema = Schema(recipe)
        schema.use_data(name)
        assert schema.kind("data.split").read("last10000") == "last10000"


def test_the_real_md5s_are_of_different_files():
    assert set(mnist.MNIST_MD5) == set(mnist.FASHION_MNIST_MD5)
    assert len({*mnist.MNIST_MD5.values(), *mnist.FASHION_MNIST_MD5.values()}) == 8
    assert (DATA["mnist"].md5, DATA["fashion_mnist"].md5) == (
        mnist.MNIST_MD5,
        mnist.FASHION_MNIST_MD5,
    )


@pytest.mark.data
def test_real_files():
    """Means and counts are as widely published: 0.1307 and 5923 zeros; 0.2860 and 6000 a class."""
    published = {"mnist": (0.1307, 5923), "fashion_mnist": (0.2860, 6000)}
    checked = 0
    for name in NAMES:
        try:
            data = ready(REAL, name, n_val=0, labels=True)
        except FileNotFoundError:
            continue
        mean, n_zeros = published[name]
        assert data.train.images.shape == (60_000, 1, 28, 28)
        assert data.test.images.shape == (10_000, 1, 28, 28)
        assert data.train.images.mean() / 255 == pytest.approx(mean, abs=5e-5)
        assert np.bincount(data.train.labels)[0] == n_zeros
        last = ready(REAL, name, n_val=10_000, split="last10000")
        assert np.array_equal(last.train.images, data.train.images[:50_000])
        assert np.array_equal(last.val.images, data.train.images[50_000:])
        checked += 1
    if not checked:
        pytest.skip("neither MNIST nor Fashion-MNIST is under data/")
