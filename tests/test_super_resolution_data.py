"""Photographs for super-resolution: crops, pairs, splits, whole images, the cache, refusals."""

import json
import pickle
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import save_image
from PIL import Image

from datamodules import image_cache, make_data
from datamodules.bicubic import downscale
from datamodules.checks import SharedError
from datamodules.image_files import UnreadableImage
from datamodules.photograph_folders import held_out_numbers
from datamodules.photos import photographs
from reproduce.kinds import WrongValue
from reproduce.schema import Schema

ROOT = Path(__file__).parents[1]
REAL = ROOT / "data" / "sr"
SMALL = {"seed": 0, "batch_size": 4, "scale": 2, "crop": 8, "epoch_images": 12, "n_val": 1}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache folder of a user whose files were not changed a moment ago."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image_cache, "UNSURE_SECONDS", -1.0)
    return tmp_path / "cache" / "paperflows"


def save_all(root, n, height=12, width=15, first_seed=0):
    """Save n photographs of random pixels; return them as (3, H, W) tensors by name."""
    return {
        f"{k}.png": torch.from_numpy(
            save_image(root / f"{k}.png", height, width, seed=first_seed + k).transpose(2, 0, 1)
        )
        for k in range(n)
    }


def save_pairs(root, n, scale=2, suffix="", height=12, width=16):
    """Save n photographs, and every scale-th row and column of each as its low_res image."""
    for k in range(n):
        pixels = save_image(root / "high" / f"{k}.png", height, width, seed=k)
        path = root / "low" / f"{k}{suffix}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels[::scale, ::scale]).save(path)
    return {"root": root / "high", "low_res_root": root / "low"}


def made(**arguments):
    return make_data("super_resolution", **(SMALL | arguments))


def ready(**arguments):
    data = made(**arguments)
    data.prepare_data()
    data.setup()
    return data


def refused(error=ValueError, **arguments):
    with pytest.raises(error) as caught:
        ready(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def sources_of(crop, photos):
    """The names of the photographs that contain a crop, and where: (name, row, column)."""
    side = crop.shape[-1]
    places = []
    for name, photo in photos.items():
        windows = photo.unfold(1, side, 1).unfold(2, side, 1)  # (3, rows, columns, side, side)
        matches = (windows == crop[:, None, None]).all(-1).all(-1).all(0)
        places += [(name, *place) for place in matches.nonzero().tolist()]
    return places


# ------------------------------------------------------------------------------ crops


def test_a_crop_is_a_part_of_a_photograph_and_its_low_res_image_is_made_of_it(tmp_path, cache):
    photos = save_all(tmp_path / "images", 5)
    data = ready(root=tmp_path / "images")
    for epoch in range(3):
        for index in range(12):
            high_res, number, low_res = data.train[epoch, index]
            assert number == index
            assert (high_res.dtype, low_res.dtype) == (torch.uint8, torch.uint8)
            assert sources_of(high_res, photos) or sources_of(high_res.flip(-1), photos)
            assert low_res.equal(downscale(high_res[None], 2)[0])


def test_an_item_is_a_function_of_seed_epoch_and_index(tmp_path, cache):
    save_all(tmp_path / "images", 5)

    def items(seed, epoch):
        data = ready(root=tmp_path / "images", seed=seed)
        return torch.stack([data.train[epoch, index][0] for index in range(12)])

    first = items(3, 7)
    data = ready(root=tmp_path / "images", seed=3)
    backwards = [data.train[7, index][0] for index in reversed(range(12))]
    data.train[0, 0]
    assert first.equal(torch.stack(backwards[::-1]))
    assert first[5].equal(data.train[7, 5][0])
    assert not first.equal(items(3, 8))
    assert not first.equal(items(4, 7))


def test_every_photograph_has_its_share_of_an_epoch(tmp_path, cache):
    photos = save_all(tmp_path / "images", 7)
    data = ready(root=tmp_path / "images", hflip=False, epoch_images=12)
    counts = []
    for epoch in range(4):
        crops = [data.train[epoch, index][0] for index in range(12)]
        counts.append(Counter(sources_of(crop, photos)[0][0] for crop in crops))
    assert [sorted(count.values()) for count in counts] == [[2, 2, 2, 3, 3]] * 4
    assert len({name for count in counts for name in count}) == 5  # the others are held out
    assert len({tuple(sorted(count.items())) for count in counts}) > 1  # others get a third crop


def test_crops_reach_every_place(tmp_path, cache):
    photos = save_all(tmp_path / "images", 3, height=9, width=10)
    data = ready(root=tmp_path / "images", epoch_images=200, hflip=False)
    crops = [data.train[0, index][0] for index in range(200)]
    places = Counter(sources_of(crop, photos)[0][1:] for crop in crops)
    assert set(places) == {(row, column) for row in range(2) for column in range(3)}
    assert min(places.values()) > 15  # 33 are expected


def test_half_of_the_crops_are_mirrored(tmp_path, cache):
    photos = save_all(tmp_path / "images", 3)
    arguments = {"root": tmp_path / "images", "epoch_images": 400}
    mirrored = ready(**arguments)
    plain = ready(**arguments, hflip=False)
    flips = 0
    for index in range(400):
        high_res, _, low_res = mirrored.train[0, index]
        expected = plain.train[0, index][0]
        is_mirrored = not high_res.equal(expected)
        flips += is_mirrored
        assert sources_of(expected, photos)
        if is_mirrored:
            assert high_res.equal(expected.flip(-1))
            assert low_res.equal(downscale(high_res[None], 2)[0])
    assert 160 < flips < 240


def test_without_augmentation_each_photograph_gives_its_middle(tmp_path, cache):
    photos = save_all(tmp_path / "images", 4, height=12, width=14)
    data = ready(root=tmp_path / "images")
    middles = data.unaugmented("train")
    assert len(middles) == 2
    for index in range(2):
        high_res, _, low_res = middles[5, index]
        assert [place[1:] for place in sources_of(high_res, photos)] == [(2, 3)]
        assert low_res.equal(downscale(high_res[None], 2)[0])
    assert len(data.train) == 12
    assert data.unaugmented("val")[0, 0][0].equal(data.val[0, 0][0])


def test_worker_processes_load_the_same_batches(tmp_path, cache):
    save_all(tmp_path / "images", 4)
    alone = list(ready(root=tmp_path / "images").train_dataloader())
    shared = list(ready(root=tmp_path / "images", num_workers=1).train_dataloader())
    assert len(alone) == len(shared) == 3
    for one, other in zip(alone, shared, strict=True):
        assert all(a.equal(b) for a, b in zip(one, other, strict=True))
    assert [tuple(part.shape) for part in alone[0]] == [(4, 3, 8, 8), (4,), (4, 3, 4, 4)]


def test_data_sets_travel_to_workers_without_their_pixels(tmp_path, cache):
    save_all(tmp_path / "images", 4, height=200, width=200)
    data = ready(root=tmp_path / "images")
    data.train[0, 0]
    assert len(pickle.dumps(data.train)) < 20_000


# ------------------------------------------------------------------------------ pairs


@pytest.mark.parametrize("suffix", ["", "x2"])
def test_own_low_res_images_are_cut_at_the_same_place(tmp_path, cache, suffix):
    """These are every second row and column, so that a shift by a pixel would be seen."""
    data = ready(**save_pairs(tmp_path, 5, suffix=suffix))
    for index in range(12):
        high_res, _, low_res = data.train[0, index]
        whole = data.train.photographs
        photos = {k: torch.from_numpy(np.array(whole[k])) for k in range(len(whole))}
        if sources_of(high_res, photos):
            assert low_res.equal(high_res[:, ::2, ::2])
        else:  # mirrored
            assert low_res.flip(-1).equal(high_res.flip(-1)[:, ::2, ::2])
    for split in (data.val, data.test):
        high_res, _, low_res = split[0, 0]
        assert low_res.equal(high_res[:, ::2, ::2])
        assert tuple(high_res.shape) == (3, 12, 16)


def test_pairs_of_a_validation_folder(tmp_path, cache):
    roots = save_pairs(tmp_path / "train", 4)
    val = save_pairs(tmp_path / "val", 1, height=14, width=17)
    (tmp_path / "val" / "high" / "0.png").unlink()
    save_image(tmp_path / "val" / "high" / "0.png", 14, 17, seed=99)
    arguments = {"val_root": val["root"], "val_low_res_root": val["low_res_root"]}
    high_res, _, low_res = ready(**roots, **arguments).val[0, 0]
    assert (tuple(high_res.shape), tuple(low_res.shape)) == ((3, 14, 16), (3, 7, 8))
    own = np.asarray(Image.open(tmp_path / "val" / "low" / "0.png")).transpose(2, 0, 1)
    assert low_res.equal(torch.from_numpy(own[:, :, :8].copy()))  # 17 pixels give 9, rounded up
    assert not low_res.equal(downscale(high_res[None], 2)[0])


def test_a_photograph_without_its_low_res_image_is_named(tmp_path, cache):
    roots = save_pairs(tmp_path, 4)
    (tmp_path / "low" / "2.png").unlink()
    message = refused(**roots)
    assert "2.png has 0 low-resolution images in" in message
    assert message.endswith("give it one of the same name, or with x2 before the ending")
    save_image(tmp_path / "low" / "2.png", 6, 8)
    save_image(tmp_path / "low" / "2.bmp", 6, 8)
    assert "2.png has 2 low-resolution images" in refused(**roots)


def test_pairs_of_another_scale_are_refused(tmp_path, cache):
    message = refused(**save_pairs(tmp_path, 4), scale=4)
    assert "0.png has 6x8 pixels, and" in message
    assert "0.png has 12x16: give another data.scale, or a low-resolution image with 1/4" in message


def test_each_folder_of_photographs_needs_its_own_of_low_res_images(tmp_path):
    message = refused(root=[str(tmp_path), str(tmp_path)], low_res_root=str(tmp_path))
    assert message.startswith("data.low_res_root has 1 folders, and data.root has 2: give a folder")
    message = refused(root=tmp_path, val_low_res_root=tmp_path)
    assert message.startswith("data.val_low_res_root has 1 folders, and data.val_root has 0")


# ------------------------------------------------------------------------------ splits


def test_images_are_held_out_by_a_hash_of_their_names(tmp_path, cache):
    names = save_all(tmp_path / "images", 12)
    data = ready(root=tmp_path / "images", n_val=2)
    splits = [data._parts[split].names for split in ("train", "val", "test")]
    assert [len(split) for split in splits] == [8, 2, 2]
    assert sorted(name for split in splits for name in split) == sorted(names)
    assert data.val.names == splits[1]
    numbers = held_out_numbers(list(names), 4)
    assert {list(names)[k] for k in numbers} == {*splits[1], *splits[2]}
    more = [*names, "new.png"]
    assert len(set(numbers) - set(held_out_numbers(more, 4))) <= 1


def test_val_and_test_have_folders_of_their_own(tmp_path, cache):
    train = save_all(tmp_path / "a", 2) | {}
    save_all(tmp_path / "b", 3, first_seed=10)
    val = save_all(tmp_path / "val", 1, first_seed=20)
    test = save_all(tmp_path / "test", 2, height=9, width=11, first_seed=30)
    data = ready(
        root=[str(tmp_path / "a"), str(tmp_path / "b")],
        val_root=str(tmp_path / "val"),
        test_root=[str(tmp_path / "test")],
    )
    assert data.counts() == {"train": 12, "val": 1, "test": 2, "photographs": 5}
    assert data._parts["train"].names == ["a/0.png", "a/1.png", "b/0.png", "b/1.png", "b/2.png"]
    assert torch.from_numpy(np.array(data.train.photographs[1])).equal(train["1.png"])
    assert data.val[0, 0][0].equal(val["0.png"][:, :12, :14])
    for index in range(2):
        high_res, number, low_res = data.test[0, index]
        assert number == index
        assert high_res.equal(test[f"{index}.png"][:, :8, :10])
        assert low_res.equal(downscale(high_res[None], 2)[0])


def test_evaluation_has_one_image_a_batch(tmp_path, cache):
    save_all(tmp_path / "images", 3)
    save_image(tmp_path / "test" / "a.png", 9, 11, seed=7)
    save_image(tmp_path / "test" / "b.png", 20, 8, seed=8)
    data = ready(root=tmp_path / "images", test_root=tmp_path / "test")
    batches = list(data.test_dataloader())
    assert [tuple(batch[0].shape) for batch in batches] == [(1, 3, 8, 10), (1, 3, 20, 8)]
    assert [tuple(batch[2].shape) for batch in batches] == [(1, 3, 4, 5), (1, 3, 10, 4)]
    assert [batch[1].tolist() for batch in batches] == [[0], [1]]


def test_the_embedded_photographs_are_the_default():
    data = ready(scale=4, crop=16, n_val=3)
    assert data.content_hash is None
    assert data.counts() == {"train": 12, "val": 3, "test": 7, "photographs": 7}
    assert (data.shape, data.n_bits, data.scale) == ((3, 16, 16), 8, 4)
    astronaut = torch.from_numpy(photographs()[0].transpose(2, 0, 1).copy())
    start = round(0.7 * 512)
    assert data.val[0, 0][0].equal(astronaut[:, :, start : start + 76])
    assert torch.from_numpy(np.array(data.train.photographs[0])).equal(astronaut[:, :, :start])
    assert ready(scale=4, crop=16, n_val=0).val_dataloader() == []
    largest = ready(scale=8, crop=296)
    assert tuple(largest.train[0, 0][2].shape) == (3, 37, 37)


def test_a_folder_may_be_tested_on_without_one_for_training(tmp_path, cache):
    """As for a trained model, whose photographs need not be there."""
    test = save_all(tmp_path / "test", 2)
    data = ready(test_root=tmp_path / "test")
    assert data.counts() == {"train": 12, "val": 1, "test": 2, "photographs": 7}
    assert data.test[0, 1][0].equal(test["1.png"][:, :12, :14])
    assert data.content_hash == made(test_root=tmp_path / "test").current_hash()
    assert len(data.content_hash) == 64
    both = ready(test_root=tmp_path / "test", val_root=tmp_path / "test", n_val=100)
    assert both.counts() == {"train": 12, "val": 2, "test": 2, "photographs": 7}


# ------------------------------------------------------------------------------ content and cache


def test_files_are_decoded_once(tmp_path, cache, monkeypatch):
    save_all(tmp_path / "images", 4)
    first = ready(root=tmp_path / "images")
    record = json.loads(next(cache.glob("*.json")).read_text())
    assert record["shapes"] == [[3, 12, 15]] * 4

    def read(*_):
        raise AssertionError("a file was decoded again")

    monkeypatch.setattr(image_cache, "read_whole_pixels", read)
    again = ready(root=tmp_path / "images", crop=4, scale=4)
    assert again.content_hash == first.content_hash
    assert again.val[0, 0][0].equal(first.val[0, 0][0][:, :12, :12])


def test_a_run_does_not_go_on_with_other_images(tmp_path, cache):
    save_all(tmp_path / "images", 4)
    save_all(tmp_path / "test", 1, first_seed=9)
    arguments = {"root": tmp_path / "images", "test_root": tmp_path / "test"}
    data = ready(**arguments)
    assert made(**arguments).current_hash() == data.content_hash
    data.load_state_dict(data.state_dict())
    save_all(tmp_path / "test", 1, first_seed=10)
    changed = ready(**arguments)
    assert changed.content_hash != data.content_hash
    with pytest.raises(SharedError, match=r"have other images than when this run began"):
        changed.load_state_dict(data.state_dict())
    assert made().current_hash() is None


def test_no_room_in_the_cache(tmp_path, cache, monkeypatch):
    save_all(tmp_path / "images", 4, height=100, width=100)
    usage = type("Usage", (), {"total": 10**9, "free": 4 * 100 * 100 * 3 - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    message = refused(root=tmp_path / "images")
    assert message.endswith("4 images take 0.0 GB: give another folder")
    usage.free += 1
    ready(root=tmp_path / "images")


# ------------------------------------------------------------------------------ refusals


def test_images_for_evaluation_must_not_be_trained_on(tmp_path, cache):
    save_all(tmp_path / "images", 4)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "renamed.png").write_bytes((tmp_path / "images" / "1.png").read_bytes())
    for key in ("val_root", "test_root"):
        other = save_all(tmp_path / "other", 1, first_seed=50)
        assert other
        roots = {"val_root": tmp_path / "other", "test_root": tmp_path / "other"}
        message = refused(root=tmp_path / "images", **(roots | {key: tmp_path / "copy"}))
        assert message.startswith(
            f"1 of the images of data.{key} are also in data.root, as renamed.png"
        )


def test_small_images_are_refused(tmp_path, cache):
    save_all(tmp_path / "images", 6)
    message = refused(root=tmp_path / "images", crop=14)
    assert message.startswith("4 of 4 images have a side of less than 14 pixels, as ")
    assert message.endswith("with 12x15: leave them out, or give a smaller data.crop")
    save_image(tmp_path / "test" / "a.png", 1, 9)
    message = refused(root=tmp_path / "images", test_root=tmp_path / "test")
    assert message.startswith("1 of 1 images have a side of less than 2 pixels, as a.png with 1x9")
    assert message.endswith(": leave them out")


def test_too_few_images_are_refused(tmp_path, cache):
    save_all(tmp_path / "images", 4)
    message = refused(root=tmp_path / "images", n_val=2)
    assert message == (
        "data.root has 4 images, of which 4 would be held out: give a smaller data.n_val, or "
        "data.val_root and data.test_root"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop": 9}, "data.crop=9 is not a multiple of data.scale=2: give 8"),
        ({"crop": 1}, "data.crop=1 is not a multiple of data.scale=2: give 2"),
        (
            {"root": "x", "n_val": 0},
            "data.n_val=0 holds out no images of data.root for the test: give data.test_root",
        ),
        ({"root": []}, "data.root=[] names no folder: give one, or null"),
        (
            {"batch_size": 13},
            "data.batch_size=13 does not fit the 12 training items: give 1 to 12",
        ),
    ],
)
def test_settings_that_do_not_fit_each_other(arguments, message):
    assert refused(**arguments) == message


def test_more_crops_than_fit_into_memory_are_refused():
    assert refused(epoch_images=10**13).startswith("data.epoch_images=10000000000000 would take ")


def test_a_missing_folder_and_a_wrong_file_are_named(tmp_path, cache):
    message = refused(FileNotFoundError, root=tmp_path / "nowhere")
    assert message == f"there is no folder {tmp_path / 'nowhere'}"
    save_all(tmp_path / "images", 4)
    (tmp_path / "images" / "bad.png").write_bytes(b"<html>")
    message = refused(UnreadableImage, root=tmp_path / "images")
    assert message == (
        f"{tmp_path / 'images' / 'bad.png'} is a web page or an SVG, and not one of PNG, JPEG, "
        "WebP, BMP and TIFF; repair it, or take it away"
    )


@pytest.mark.parametrize(
    ("folder", "name", "n"), [("Set5", "Set5", 5), ("BSDS500/val", "BSD100", 100)]
)
def test_a_known_set_has_to_be_whole(tmp_path, cache, folder, name, n):
    save_all(tmp_path / "images", 4)
    save_all(tmp_path / folder, 4, first_seed=9)
    message = refused(root=tmp_path / "images", test_root=tmp_path / folder)
    assert message == (
        f"{tmp_path / folder} has 4 images, but {name} has {n}: leave the set's own images in it, "
        "in full resolution"
    )


@pytest.mark.slow
def test_one_process_loads_more_crops_than_a_gpu_takes(tmp_path, cache):
    """From photographs of the size of DIV2K's. A step of the paper's model takes 16 crops."""
    for k in range(4):
        save_image(tmp_path / "images" / f"{k}.png", 1356, 2040, seed=k)
    data = ready(
        root=tmp_path / "images", scale=4, crop=160, batch_size=16, epoch_images=640, n_val=1
    )
    start = time.perf_counter()
    n_batches = sum(1 for _ in data.train_dataloader())
    seconds = time.perf_counter() - start
    assert n_batches == 40
    assert 640 / seconds > 100


# ------------------------------------------------------------------------------ settings


def test_folders_are_given_as_one_or_as_a_list():
    schema = Schema("no_such_recipe")
    schema.use_data("super_resolution")
    kind = schema.kind("data.root")
    assert kind.read("data/sr") == "data/sr"
    assert kind.read("[data/a,data/b]") == ["data/a", "data/b"]
    assert kind.read("null") is None
    with pytest.raises(WrongValue):
        kind.read("{}")


@pytest.mark.data
@pytest.mark.skipif(not (REAL / "BSDS500").is_dir(), reason="no BSDS500 under data/sr/")
def test_bsds500(tmp_path, cache):
    """Training on train and test, and BSD100, which is BSDS500's val, for the test."""
    roots = [str(REAL / "BSDS500" / part) for part in ("train", "test")]
    settings = {"root": roots, "scale": 4, "crop": 160, "n_val": 5, "epoch_images": 16}
    data = ready(**settings, test_root=REAL / "BSDS500" / "val")
    assert data.counts() == {"train": 16, "val": 5, "test": 100, "photographs": 395}
    sizes = Counter(tuple(data.test[0, k][0].shape[1:]) for k in range(100))
    assert set(sizes) == {(320, 480), (480, 320)}
    assert "are also in data.root" in refused(**settings, test_root=REAL / "BSDS500" / "test")
