"""Data are pure functions of (seed, epoch, index).

Dequantisation, samplers, loaders, and the data sets; tests/test_mnist.py has MNIST's own.
"""

import hashlib
import pickle
import shutil
import tarfile
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from idx_files import make_official, write
from image_folders import make_split_folder
from lightning.pytorch.utilities import rank_zero_only

from datamodules import DATA, cifar10, make_data, photos
from datamodules.checks import SharedError
from datamodules.cifar10 import CIFAR10
from datamodules.dequantization import UniformDequantizer
from datamodules.images import ImageArray, shift_image
from datamodules.photos import LARGEST_SIZE, REGIONS, Crops, Photos, photographs, region
from datamodules.samplers import EvalSampler, TrainLoader, TrainSampler
from datamodules.two_moons import TwoMoons
from flows.glow import Glow
from flows.realnvp import RealNVP2d
from lightning_modules.density import DensityModule
from lightning_modules.noise import batch_noise, image_noise
from lightning_modules.stopping import AgreedError
from reproduce.command import command

REAL = Path(__file__).resolve().parent.parent / "data"
LARGEST = {torch.float32: 1 - 2**-24, torch.float64: 1 - 2**-53}  # the largest number below 1


def random_images(n, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3, size, size), dtype=np.uint8)


def contents(images):
    """Images as a list of bytes, so that sets of images can be compared."""
    return [np.asarray(image).tobytes() for image in images]


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


# ----------------------------------------------------------------------------- dequantisation


def test_dequantizer_is_the_formula():
    q = torch.tensor([0, 1, 128, 255], dtype=torch.uint8)
    u = torch.tensor([0.0, 0.5, 0.25, 0.75])
    x, log_weight = UniformDequantizer(8)(q, u)
    assert x.tolist() == [0.0, 1.5 / 256, 128.25 / 256, 255.75 / 256]
    assert log_weight.tolist() == [0.0] * 4
    assert UniformDequantizer(5)(q[:2], u[:2])[0].tolist() == [0.0, 1.5 / 32]


@pytest.mark.parametrize("n_bits", [5, 8])
@pytest.mark.parametrize("dtype", LARGEST)
def test_dequantizer_stays_below_one(n_bits, dtype):
    q = torch.tensor([2**n_bits - 1], dtype=torch.uint8)
    u = torch.tensor([LARGEST[dtype]], dtype=dtype)
    x, log_weight = UniformDequantizer(n_bits)(q, u)
    assert x.dtype == log_weight.dtype == dtype
    assert x.item() == LARGEST[dtype]


@pytest.mark.parametrize("n_bits", [5, 8])
def test_dequantizer_keeps_the_integers(n_bits):
    """floor(2^n x) is q.

    The exceptions are sums that float32 rounds up to q + 1: of 8 bits about 5 in a million.
    """
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(2**n_bits, (1_000_000,), generator=generator, dtype=torch.uint8)
    x, _ = UniformDequantizer(n_bits)(q, torch.rand(len(q), generator=generator))
    off = (x * 2**n_bits).floor() - q
    assert ((off == 0) | (off == 1)).all()
    assert off.sum() <= 20
    assert 0 <= x.min() < x.max() < 1


@pytest.mark.parametrize("n_bits", [0, -1, 9, 16, 5.5, 5.0, None])
def test_impossible_bits_are_refused(n_bits):
    for make in (
        UniformDequantizer,
        lambda n: CIFAR10("data", 8, n_bits=n),
        lambda n: Photos(8, n_bits=n),
    ):
        with pytest.raises(ValueError, match=rf"data\.n_bits={n_bits} .* give 1 to 8") as error:
            make(n_bits)
        one_line(error)


# ----------------------------------------------------------------------------- samplers


def order(n=23, batch_size=4, seed=0, epoch=0, **ranks):
    sampler = TrainSampler(n, batch_size, seed, **ranks)
    sampler.set_epoch(epoch)
    items = list(sampler)
    assert len(items) == len(sampler)
    return items


def test_train_order_is_a_function_of_seed_and_epoch():
    assert order() == order()
    assert order(epoch=3) == order(epoch=3)
    indices = [[i for _, i in items] for items in (order(), order(epoch=1), order(seed=1))]
    assert indices[0] != indices[1] != indices[2] != indices[0]
    assert {epoch for epoch, _ in order(epoch=3)} == {3}


def test_train_order_has_no_repeats_and_drops_the_incomplete_batch():
    indices = [i for _, i in order(n=23, batch_size=4)]
    assert len(indices) == len(set(indices)) == 20
    assert set(indices) < set(range(23))
    assert sorted(i for _, i in order(n=24, batch_size=4)) == list(range(24))


def test_no_item_is_dropped_in_every_epoch():
    assert {i for epoch in range(20) for _, i in order(epoch=epoch)} == set(range(23))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("epoch", [0, 5])
def test_ranks_slice_the_batches_of_a_single_process(world_size, epoch):
    batch_size = 8
    local = 8 // world_size
    alone = order(n=50, batch_size=batch_size, epoch=epoch)
    ranks = [
        order(n=50, batch_size=batch_size, epoch=epoch, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    for b in range(50 // batch_size):
        together = [item for rank in ranks for item in rank[b * local : (b + 1) * local]]
        assert together == alone[b * batch_size : (b + 1) * batch_size]


@pytest.mark.parametrize("world_size", [1, 2])
def test_start_batch_skips_exactly(world_size):
    whole = order(n=50, batch_size=8, rank=world_size - 1, world_size=world_size)
    sampler = TrainSampler(50, 8, 0, world_size - 1, world_size)
    for start in range(7):
        sampler.skip = start * 8 // world_size
        assert list(sampler) == whole[sampler.skip :]


@pytest.mark.parametrize(
    ("n", "batch_size", "world_size"), [(50, 9, 2), (50, 6, 4), (50, 51, 1), (3, 4, 2), (50, 0, 1)]
)
def test_impossible_batch_sizes(n, batch_size, world_size):
    with pytest.raises(ValueError, match=f"data.batch_size={batch_size}") as error:
        TrainSampler(n, batch_size, 0, world_size=world_size)
    one_line(error)


def test_a_batch_may_be_the_whole_set():
    assert sorted(i for _, i in order(n=8, batch_size=8)) == list(range(8))


@pytest.mark.parametrize(("n", "world_size"), [(10, 1), (10, 3), (10, 4), (3, 4), (12, 4)])
def test_eval_shards_are_disjoint_and_complete(n, world_size):
    shards = [EvalSampler(n, rank, world_size) for rank in range(world_size)]
    items = [item for shard in shards for item in shard]
    assert sorted(items) == [(0, i) for i in range(n)]
    assert [len(s) for s in shards] == [len(list(s)) for s in shards]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


# ----------------------------------------------------------------------------- loaders


def loader(num_workers, images, epoch=1):
    """A loader as StatelessDataModule builds it: 5 batches of 4, and one image left over."""
    sampler = TrainSampler(len(images), 4, seed=0)
    sampler.set_epoch(epoch)
    workers = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    return TrainLoader(
        ImageArray(images, hflip=True, shift=0.1), 4, sampler=sampler, drop_last=True, **workers
    )


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(p, q) for s, t in zip(a, b, strict=True) for p, q in zip(s, t, strict=True)
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_goes_on_where_it_stopped(num_workers):
    images = random_images(21)
    whole = loader(num_workers, images)
    assert whole.state_dict() == {"batch": 0}
    batches = []
    states = []
    for batch in whole:
        batches.append(batch)
        states.append(whole.state_dict())
    assert states == [{"batch": 1}, {"batch": 2}, {"batch": 3}, {"batch": 4}, {"batch": 0}]

    fresh = loader(num_workers, images)
    fresh.load_state_dict(states[1])
    assert fresh.state_dict() == {"batch": 2}
    rest = [(batch, fresh.state_dict()) for batch in fresh]
    assert same([b for b, _ in rest], batches[2:])
    assert [s for _, s in rest] == states[2:]

    for resumed, uninterrupted in zip(epoch_of(fresh, 2), epoch_of(whole, 2), strict=True):
        assert same([resumed], [uninterrupted])
    assert len(epoch_of(fresh, 3)) == len(fresh) == 5


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return list(loader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_counts_what_it_handed_out_not_what_it_fetched(num_workers):
    images = random_images(21)
    interrupted = loader(num_workers, images)
    iterator = iter(interrupted)
    first = [next(iterator), next(iterator)]
    state = interrupted.state_dict()
    assert state == {"batch": 2}
    fresh = loader(num_workers, images)
    fresh.load_state_dict(state)
    assert same(first + list(fresh), list(loader(num_workers, images)))


def test_workers_change_nothing():
    images = random_images(21)
    assert same(list(loader(0, images)), list(loader(2, images)))


# ----------------------------------------------------------------------------- flips


def flipped(data, epoch):
    """Whether each item comes out mirrored.

    It fails where an item is neither the image nor its mirror image.
    """
    out = []
    for i, image in enumerate(data.images):
        item, index = data[epoch, i]
        assert index == i
        mirrored = np.array_equal(item, image[..., ::-1])
        assert mirrored or np.array_equal(item, image)
        out.append(mirrored)
    return out


def test_flips_are_a_function_of_seed_epoch_and_index():
    images = random_images(400)
    data = ImageArray(images, seed=3, hflip=True)
    first = flipped(data, 0)
    assert 160 < sum(first) < 240  # four standard deviations of ten
    second = flipped(data, 1)
    assert first != second
    assert flipped(data, 0) == first  # after another epoch
    assert flipped(ImageArray(images, seed=3, hflip=True), 1) == second
    assert flipped(ImageArray(images, seed=4, hflip=True), 0) != first
    # Items may be asked for in any order.
    assert np.array_equal(data[0, 250][0], ImageArray(images, seed=3, hflip=True)[0, 250][0])


@pytest.mark.parametrize("epoch", [0, 5])
def test_the_stream_of_flips_never_changes(epoch):
    """Recorded results depend on it."""
    expected = (np.random.default_rng([3, epoch, 1]).random(400) < 0.5).tolist()
    images = random_images(400)
    assert flipped(ImageArray(images, seed=3, hflip=True), epoch) == expected
    both, shifts = (ImageArray(images, seed=3, hflip=hflip, shift=0.1) for hflip in (True, False))
    pairs = [(both[epoch, i][0], shifts[epoch, i][0]) for i in range(400)]
    assert [torch.equal(a, b.flip(-1)) for a, b in pairs] == expected
    assert [torch.equal(a, b) for a, b in pairs] == [not f for f in expected]


def test_no_flips_unless_asked_for():
    assert not any(flipped(ImageArray(random_images(50), seed=3), 1))


# ----------------------------------------------------------------------------- shifts and bits


def test_shift_by_whole_pixels_moves_and_repeats_the_edges():
    image = random_images(1)[0]
    moved = np.roll(image, (2, -1), axis=(1, 2))  # two down, one to the left
    moved[:, :2] = moved[:, 2:3]
    moved[:, :, -1] = moved[:, :, -2]
    assert np.array_equal(shift_image(image, (2, -1)), moved)
    assert shift_image(image, (2, -1)).dtype == np.uint8
    assert np.array_equal(shift_image(image, (0, 5))[:, :, :6], image[:, :, :1].repeat(6, 2))
    assert np.array_equal(shift_image(image, (0, -5))[:, :, 2:], image[:, :, -1:].repeat(6, 2))
    assert np.array_equal(shift_image(image, (7.9, 0))[:, :7], image[:, :1].repeat(7, 1))


def test_shift_by_half_a_pixel_is_the_mean_of_two():
    image = random_images(1)[0]
    above, left = (
        np.concatenate([image.take([0], axis), image], axis).astype(int) for axis in (1, 2)
    )
    assert np.array_equal(shift_image(image, (0.5, 0)), (above[:, :-1] + above[:, 1:]) // 2)
    assert np.array_equal(shift_image(image, (0, 0.5)), (left[:, :, :-1] + left[:, :, 1:]) // 2)


def test_shift_is_bilinear_and_floors():
    image = np.array([[[0, 100, 200], [10, 111, 255]]], dtype=np.uint8)
    assert shift_image(image, (0, 0.25)).tolist() == [[[0, 75, 175], [10, 85, 219]]]  # 85.75, 219.0
    # The first row is 2.5, 52.625, 158.25 before it is rounded down.
    assert shift_image(image, (-0.25, 0.5)).tolist() == [[[2, 52, 158], [10, 60, 183]]]


def test_shift_leaves_even_areas_alone():
    """No level is lost where all pixels are equal.

    In float64, weights that sum to 1 - 1e-16 and the floor take a level off 6 % of the pixels.
    """
    for value, by in zip(
        range(0, 256, 5), np.random.default_rng(0).uniform(-3.2, 3.2, (52, 2)), strict=True
    ):
        assert set(shift_image(np.full((1, 32, 32), value, np.uint8), by).flat) == {value}


def test_shift_of_zero_is_the_image():
    images = random_images(20)
    data = ImageArray(images, seed=3, shift=0.0)
    assert all(
        np.array_equal(data[epoch, i][0], images[i]) for epoch in range(3) for i in range(20)
    )
    assert all(np.array_equal(shift_image(image, (0.0, 0.0)), image) for image in images)


def test_shifts_are_a_function_of_seed_epoch_and_index():
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 16), dtype=np.uint8)

    def items(epoch, seed=3):
        data = ImageArray(images, seed, shift=0.1)
        assert [data[epoch, i][1] for i in range(40)] == list(range(40))
        return [data[epoch, i][0].numpy() for i in range(40)]

    by = np.random.default_rng([3, 2, 2]).uniform(-0.1, 0.1, (40, 2)) * [8, 16]  # down, right
    assert np.array_equal(items(2), [shift_image(*pair) for pair in zip(images, by, strict=True)])
    assert set(contents(items(2))).isdisjoint(contents([*items(1), *items(2, seed=4), *images]))
    data = ImageArray(images, 3, shift=0.1)
    later = data[2, 7][0], data[1, 30][0], data[2, 3][0]  # in any order
    assert contents(later) == contents([items(2)[7], items(1)[30], items(2)[3]])


def test_bits_are_the_most_significant_ones():
    image = np.array([0, 7, 8, 127, 128, 200, 248, 255], dtype=np.uint8).reshape(1, 1, 2, 4)
    for n_bits, values in {
        8: [0, 7, 8, 127, 128, 200, 248, 255],
        5: [0, 0, 1, 15, 16, 25, 31, 31],
        1: [0, 0, 0, 0, 1, 1, 1, 1],
    }.items():
        item = ImageArray(image, n_bits=n_bits)[0, 0][0]
        assert item.dtype == torch.uint8
        assert item.flatten().tolist() == values


def test_bits_are_taken_from_augmented_images():
    images = random_images(30)
    eight, five = (ImageArray(images, hflip=True, shift=0.1, n_bits=n_bits) for n_bits in (8, 5))
    assert all(torch.equal(five[1, i][0], eight[1, i][0] // 8) for i in range(30))
    coarse = ImageArray(images // 8, hflip=True, shift=0.1)  # bits before shifts
    assert not any(torch.equal(five[1, i][0], coarse[1, i][0]) for i in range(30))


# ----------------------------------------------------------------------------- CIFAR-10


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Six pickles of 40 images each in the official format, and as many images in idx files.

    root, folder: where they are. train, test: the images, (200, 3, 32, 32) and (40, 3, 32, 32).
    train_labels, test_labels: their classes.
    """
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = {}
    labels = {}
    for number, table in enumerate(
        ["TRAIN_MD5", "TRAIN_MD5", "TRAIN_MD5", "TRAIN_MD5", "TRAIN_MD5", "TEST_MD5"]
    ):
        name = f"data_batch_{number + 1}"
        if table == "TEST_MD5":
            name = "test_batch"
        images[name] = random_images(40, 32, seed=number)
        labels[name] = np.random.default_rng(number).integers(0, 10, 40).tolist()
        batch = {b"data": images[name].reshape(40, 3072), b"labels": labels[name]}
        (folder / name).write_bytes(pickle.dumps(batch))
        md5 = hashlib.md5((folder / name).read_bytes()).hexdigest()
        monkeypatch.setitem(getattr(cifar10, table), name, md5)
    idx_files = make_official(monkeypatch, 200, 40)
    for name in ("mnist", "fashion_mnist"):
        write(tmp_path / name, idx_files.contents)
    train = np.concatenate([images[f"data_batch_{i}"] for i in range(1, 6)])
    train_labels = [label for i in range(1, 6) for label in labels[f"data_batch_{i}"]]
    classes = {"train_labels": train_labels, "test_labels": labels["test_batch"]}
    return SimpleNamespace(
        root=tmp_path, folder=folder, train=train, test=images["test_batch"], **classes
    )


def ready(root, **arguments):
    data = CIFAR10(root, **({"batch_size": 8, "n_val": 30, "download": False} | arguments))
    data.prepare_data()
    data.setup()
    return data


def test_cifar_pixels_arrive_where_they_belong(cifar):
    data = ready(cifar.root)
    assert data.shape == (3, 32, 32)
    assert data.n_bits == 8
    assert np.array_equal(data.test.images, cifar.test)  # in the official order
    batch, indices = next(iter(data.test_dataloader()))
    assert batch.dtype == torch.uint8
    assert batch.shape == (8, 3, 32, 32)
    assert indices.tolist() == list(range(8))
    with open(cifar.folder / "test_batch", "rb") as file:
        row = pickle.load(file, encoding="bytes")[b"data"][3]
    assert batch[3, 1, 2, 5] == row[1024 + 2 * 32 + 5]  # the green plane, line 2, column 5


def test_cifar_split_is_disjoint_complete_and_the_same_for_every_seed(cifar):
    data = ready(cifar.root)
    train = contents(data.train.images)
    val = contents(data.val.images)
    assert (len(train), len(val), data.n_train) == (170, 30, 170)
    assert set(train).isdisjoint(val)
    assert sorted(train + val) == sorted(contents(cifar.train))
    other = ready(cifar.root, seed=1)
    assert contents(other.val.images) == val
    assert contents(other.train.images) == train
    assert [contents(i) for i, _ in other.train_dataloader()] != [
        contents(i) for i, _ in data.train_dataloader()
    ]


def test_cifar_without_validation_trains_on_everything(cifar):
    data = ready(cifar.root, n_val=0)
    assert data.n_train == 200
    assert np.array_equal(data.train.images, cifar.train)
    assert len(data.val) == 0
    assert data.val_dataloader() == []


def test_cifar_flips_in_training_only(cifar):
    data = ready(cifar.root)
    assert 50 < sum(flipped(data.train, 0)) < 120
    assert not any(flipped(data.val, 0) + flipped(data.test, 0))
    assert not any(flipped(ready(cifar.root, hflip=False).train, 0))


def test_cifar_shifts_in_training_only(cifar):
    data = ready(cifar.root, shift=0.1, hflip=False, seed=5)
    by = np.random.default_rng([5, 1, 2]).uniform(-3.2, 3.2, (170, 2))
    assert all(
        np.array_equal(data.train[1, i][0], shift_image(data.train.images[i], by[i]))
        for i in range(170)
    )
    assert not any(np.array_equal(data.train[1, i][0], data.train.images[i]) for i in range(170))
    # `flipped` fails where an item is not the image.
    assert not any(flipped(data.val, 1) + flipped(data.test, 1))
    plain = ready(cifar.root, hflip=False)
    assert all(np.array_equal(plain.train[1, i][0], plain.train.images[i]) for i in range(170))


@pytest.mark.parametrize("shift", [-0.1, 1.0, 3, float("nan")])
def test_cifar_shift_is_a_share(shift):
    with pytest.raises(ValueError, match=rf"data\.shift={shift} .* from 0 to less than 1") as error:
        CIFAR10("data", 8, shift=shift)
    one_line(error)


def test_cifar_of_five_bits(cifar):
    data = ready(cifar.root, n_bits=5)
    eight = ready(cifar.root)
    assert (data.n_bits, data.dequantizer.n_bits, type(data.dequantizer)) == (
        5,
        5,
        UniformDequantizer,
    )
    assert (eight.n_bits, eight.dequantizer.n_bits) == (8, 8)
    batch = next(iter(data.test_dataloader()))[0]
    assert batch.dtype == torch.uint8
    assert np.array_equal(batch, cifar.test[:8] // 8)
    assert all(torch.equal(data.train[1, i][0], eight.train[1, i][0] // 8) for i in range(170))
    assert all(torch.equal(data.val[1, i][0], eight.val[1, i][0] // 8) for i in range(30))
    x, _ = data.dequantizer(batch, torch.zeros(batch.shape))
    assert (x.min(), x.max()) == (0, 31 / 32)


def test_cifar_labels_belong_to_their_images(cifar):
    data = ready(cifar.root, labels=True, shift=0.1, n_bits=5)
    plain = ready(cifar.root, shift=0.1, n_bits=5)
    classes = dict(
        zip(
            contents(cifar.train) + contents(cifar.test),
            cifar.train_labels + cifar.test_labels,
            strict=True,
        )
    )
    for split in ("train", "val", "test"):
        loader, same_loader = (getattr(d, f"{split}_dataloader")() for d in (data, plain))
        for (images, indices, labels), without in zip(loader, same_loader, strict=True):
            assert (labels.dtype, labels.shape) == (torch.int64, indices.shape)
            assert same([[images, indices]], [without])
            assert labels.tolist() == [
                classes[c] for c in contents(getattr(data, split).images[indices])
            ]
    assert next(iter(data.test_dataloader()))[2].tolist() == cifar.test_labels[:8]
    assert [len(batch) for batch in data.train_batches(16)] == [3, 3]
    assert same(list(data.train_batches(16)), list(data.train_dataloader())[:2])
    other = ready(cifar.root, labels=True, seed=1)  # with another augmentation
    assert data.train[0, 5][2] == other.train[7, 5][2]


def test_class_names(cifar):
    assert (CIFAR10.n_classes, len(CIFAR10.class_names)) == (10, 10)
    assert [CIFAR10.class_names[i] for i in (0, 3, 6, 9)] == ["airplane", "cat", "frog", "truck"]
    assert (Photos.n_classes, len(Photos.class_names), Photos.class_names[1]) == (7, 7, "cat")
    assert (TwoMoons.n_classes, TwoMoons.class_names) == (None, None)


def is_crop(crop, photo):
    n = len(crop)
    starts = np.argwhere((photo[: -n + 1, : -n + 1] == crop[0, 0]).all(-1))
    return any(
        np.array_equal(photo[row : row + n, column : column + n], crop) for row, column in starts
    )


def test_labels_of_photographs_say_which_one_a_crop_is_of():
    data, without = (
        Photos(8, size=16, n_train=40, n_val=30, n_test=30, labels=labels)
        for labels in (True, False)
    )
    data.setup()
    without.setup()
    for split, n in (("train", 40), ("val", 30), ("test", 30)):
        parts = [region(photo, split) for photo in photographs()]
        for index in range(n):
            image, i, label = getattr(data, split)[3, index]
            assert (i, type(label)) == (index, int)
            assert torch.equal(image, getattr(without, split)[3, index][0])
            crop = image.permute(1, 2, 0).numpy()
            assert any(is_crop(pixels, parts[label]) for pixels in (crop, crop[:, ::-1]))
    assert len({data.train[0, i][2] for i in range(40)}) == 7


def test_a_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert CIFAR10("~/data", 8).root == tmp_path / "data"
    assert CIFAR10("~", 8).root == tmp_path
    assert CIFAR10(tmp_path / "~" / "data", 8).root == tmp_path / "~" / "data"
    with pytest.raises(ValueError, match=r"^data\.root=~nobody17/data: ~nobody17 is no") as error:
        CIFAR10("~nobody17/data", 8)
    one_line(error)


def test_cifar_in_memory_needs_no_files_for_the_test(cifar):
    data = ready(cifar.root)
    shutil.rmtree(cifar.folder)
    data.prepare_data()  # Lightning calls it again before the test
    data.setup("test")
    images, _ = next(iter(data.test_dataloader()))
    assert np.array_equal(images, cifar.test[:8])


@pytest.mark.parametrize("n_val", [-1, 50_000, 60_000])
def test_cifar_needs_training_images(cifar, n_val):
    with pytest.raises(ValueError, match=f"data.n_val={n_val}") as error:
        ready(cifar.root, n_val=n_val)
    one_line(error)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
def test_cifar_damaged_file(cifar, name):
    path = cifar.folder / name
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged") as error:
        ready(cifar.root)
    message = one_line(error)
    assert str(path) in message
    assert f"delete {cifar.folder}" in message
    assert "data.download=true" in message


def test_cifar_missing_without_download(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cifar-10-python\.tar\.gz") as error:
        CIFAR10(tmp_path / "nowhere", 8, download=False).prepare_data()
    assert "data.root" in one_line(error)
    assert not (tmp_path / "nowhere").exists()


def test_cifar_missing_in_setup(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.root") as error:
        CIFAR10(tmp_path, 8, download=False).setup()
    one_line(error)


@pytest.fixture
def archive(cifar, tmp_path_factory, monkeypatch):
    """An archive like the official one; the unpacked folder is removed."""
    path = tmp_path_factory.mktemp("archive") / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(cifar.folder, "cifar-10-batches-py")
    shutil.rmtree(cifar.folder)
    monkeypatch.setattr(cifar10, "ARCHIVE_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def test_cifar_archive_put_there_by_hand_is_unpacked(cifar, archive):
    shutil.copy(archive, cifar.root)
    assert np.array_equal(ready(cifar.root).test.images, cifar.test)


def test_cifar_missing_files_come_from_the_archive(cifar, archive):
    shutil.copy(archive, cifar.root)
    ready(cifar.root)
    (cifar.folder / "data_batch_2").unlink()
    assert len(ready(cifar.root).train) == 170


def test_cifar_broken_download_does_not_block_the_next(cifar, archive, monkeypatch, capsys):
    def broken(url, root, filename, md5):
        Path(root, filename).write_bytes(archive.read_bytes()[:5000])
        raise urllib.error.URLError("Temporary failure in name resolution")

    def whole(url, root, filename, md5):
        assert not Path(root, filename).exists()  # torchvision would append or keep it
        shutil.copy(archive, root)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", broken)
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="could not be downloaded") as error:
            ready(cifar.root, download=True)
        message = one_line(error)
        assert "Temporary failure in name resolution" in message
        assert "cifar-10-python.tar.gz" in message
        assert not cifar.folder.exists()
    monkeypatch.setattr("torchvision.datasets.utils.download_url", whole)
    assert np.array_equal(ready(cifar.root, download=True).test.images, cifar.test)
    assert "Downloading CIFAR-10" in capsys.readouterr().out


def test_complete_cifar_files_need_no_network(cifar, monkeypatch):
    monkeypatch.setattr(
        "torchvision.datasets.utils.download_url", lambda *a: pytest.fail("downloads")
    )
    assert len(ready(cifar.root, download=True).test) == 40


# Of the images in the official order, split by default_rng(0).permutation(50_000). They were
# computed from the pickles with numpy.
CIFAR_MD5 = [
    "56c1e3fc28a7391bdfc129c338486f81",
    "1b7735cfcf47af8bb24b18417d68c41f",
    "f1aa22116df97725db0e47461c45a82b",
]


@pytest.mark.data
def test_cifar_real_files():
    if not (REAL / "cifar-10-batches-py" / "test_batch").is_file():
        pytest.skip("CIFAR-10 is not under data/")
    data = ready(REAL, n_val=5000)
    sets = data.train.images, data.val.images, data.test.images
    assert [s.shape for s in sets] == [(45_000, 3, 32, 32), (5000, 3, 32, 32), (10_000, 3, 32, 32)]
    assert {s.dtype for s in sets} == {np.dtype(np.uint8)}
    assert sets[2][0, :, 0, 0].tolist() == [158, 112, 49]  # the cat
    assert [hashlib.md5(s.tobytes()).hexdigest() for s in sets] == CIFAR_MD5
    mean = (sets[0].mean((0, 2, 3)) * 45_000 + sets[1].mean((0, 2, 3)) * 5000) / 50_000 / 255
    assert mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-5)  # as widely published


@pytest.mark.data
def test_cifar_real_labels():
    if not (REAL / "cifar-10-batches-py" / "test_batch").is_file():
        pytest.skip("CIFAR-10 is not under data/")
    data = ready(REAL, n_val=0, labels=True, n_bits=5)
    first = [
        [data.class_names[split[0, i][2]] for i in range(5)] for split in (data.train, data.test)
    ]
    assert first == [
        ["frog", "truck", "truck", "deer", "automobile"],
        ["cat", "ship", "ship", "airplane", "frog"],
    ]
    assert [np.bincount(split.labels).tolist() for split in (data.train, data.test)] == [
        [5000] * 10,
        [1000] * 10,
    ]
    meta = REAL / "cifar-10-batches-py" / "batches.meta"
    if meta.is_file():
        names = pickle.loads(meta.read_bytes(), encoding="bytes")[b"label_names"]
        assert tuple(name.decode() for name in names) == data.class_names
    part = ready(REAL, n_val=5000, labels=True)  # images that are held out keep their labels
    whole = dict(
        zip(contents(data.train.images[::97]), data.train.labels[::97].tolist(), strict=True)
    )
    for split in (part.train, part.val):
        pairs = [
            (whole[c], split.labels[i]) for i, c in enumerate(contents(split.images)) if c in whole
        ]
        assert len(pairs) > 30
        assert all(a == b for a, b in pairs)
    assert data.test[0, 0][0][:, 0, 0].tolist() == [158 // 8, 112 // 8, 49 // 8]


# ----------------------------------------------------------------------------- photographs


def made_photos(**arguments):
    data = Photos(**({"batch_size": 8, "n_train": 40, "n_val": 20, "n_test": 20} | arguments))
    data.setup()
    return data


@pytest.mark.parametrize("width", [451, 512, 741, 640, 427, 100, 7])
def test_regions_are_disjoint_and_complete(width):
    columns = np.broadcast_to(np.arange(width), (2, width))
    parts = [region(columns, split)[0].tolist() for split in ("train", "val", "test")]
    assert [column for part in parts for column in part] == list(range(width))
    assert all(parts)
    assert len(parts[0]) == pytest.approx(0.7 * width, abs=1)


def test_photographs():
    photos_read = photographs()
    assert len(photos_read) == 7
    assert {p.dtype for p in photos_read} == {np.dtype(np.uint8)}
    assert all(p.ndim == 3 and p.shape[2] == 3 and min(p.shape[:2]) >= 300 for p in photos_read)
    assert len({p.tobytes() for p in photos_read}) == 7


def test_splits_share_no_pixel(monkeypatch):
    """Photographs whose pixels hold their own column, so that a crop says where it comes from."""
    columns = np.arange(250, dtype=np.uint8)[None, :, None] * np.ones((60, 1, 3), dtype=np.uint8)
    monkeypatch.setattr(photos, "photographs", lambda: [columns, columns])
    data = made_photos(n_train=300, n_val=300, n_test=300)
    train = {
        int(v) for epoch in range(3) for i in range(300) for v in data.train[epoch, i][0].unique()
    }
    val = set(np.unique(data.val.images))
    test = set(np.unique(data.test.images))
    assert (train, val, test) == (set(range(175)), set(range(175, 212)), set(range(212, 250)))


def test_every_photograph_is_used(monkeypatch):
    blank = [np.full_like(photo, number) for number, photo in enumerate(photographs())]
    monkeypatch.setattr(photos, "photographs", lambda: blank)
    data = made_photos(n_train=1000, n_val=500, n_test=500)
    assert {int(data.train[0, i][0][0, 0, 0]) for i in range(1000)} == set(range(7))
    assert set(data.val.images.flat) == set(data.test.images.flat) == set(range(7))
    # No crop spans two photographs.
    assert all(len(np.unique(image)) == 1 for image in data.val.images)


def test_crops_are_uniform_over_all_positions():
    """4 x 5 positions of a 2x2 crop in the first photograph, one in the second."""
    first = np.arange(5 * 6, dtype=np.uint8).reshape(5, 6, 1).repeat(3, 2)
    second = np.full((2, 2, 3), 99, dtype=np.uint8)
    crops = Crops([first, second], 21_000, 2, seed=0, hflip=False, labels=False)
    corners = [int(crops[0, i][0][0, 0, 0]) for i in range(len(crops))]
    values, counts = np.unique(corners, return_counts=True)
    assert values.tolist() == [6 * row + column for row in range(4) for column in range(5)] + [99]
    # 1000 each, within five standard deviations.
    assert 850 < counts.min() < counts.max() < 1150
    for i in range(50):
        crop = crops[0, i][0][0]
        assert crop[0, 0] == 99 or (crop - crop[0, 0]).tolist() == [[0, 1], [6, 7]]


def test_train_crops_are_a_function_of_seed_epoch_and_index():
    def crops(epoch, **arguments):
        data = made_photos(**arguments).train
        assert [data[epoch, i][1] for i in range(40)] == list(range(40))
        return contents(data[epoch, i][0] for i in range(40))

    assert crops(0) == crops(0)
    assert set(crops(0)).isdisjoint(crops(1))
    assert set(crops(0)).isdisjoint(crops(0, seed=1))
    one = made_photos()
    later = one.train[1, 3][0]
    # Epochs may be asked for in any order.
    assert contents([one.train[0, 7][0], later]) == [crops(0)[7], crops(1)[3]]


def test_train_crops_are_flipped_half_of_the_time():
    flips = made_photos(n_train=400).train
    plain = made_photos(n_train=400, hflip=False).train
    mirrored = [torch.equal(flips[2, i][0], plain[2, i][0].flip(-1)) for i in range(400)]
    assert all(m or torch.equal(flips[2, i][0], plain[2, i][0]) for i, m in enumerate(mirrored))
    assert 160 < sum(mirrored) < 240


def test_evaluation_crops_do_not_depend_on_the_seed():
    one = made_photos()
    other = made_photos(seed=7, hflip=False)
    assert contents(one.val.images) == contents(other.val.images)
    assert contents(one.test.images) == contents(other.test.images)
    assert len(set(contents(one.val.images))) == len(one.val) == 20
    assert np.array_equal(one.val[5, 3][0], one.val.images[3])


@pytest.mark.parametrize("size", [64, 1])
def test_photos_of_another_size(size):
    data = made_photos(size=size)
    assert data.shape == (3, size, size)
    assert data.val.images.shape == (20, 3, size, size)
    image, indices = next(iter(data.train_dataloader()))
    assert image.shape == (8, 3, size, size)
    assert image.dtype == torch.uint8
    assert indices.shape == (8,)


def test_photos_of_five_bits():
    five = made_photos(n_bits=5)
    eight = made_photos()
    assert (five.n_bits, five.dequantizer.n_bits, type(five.dequantizer)) == (
        5,
        5,
        UniformDequantizer,
    )
    assert (eight.n_bits, eight.dequantizer.n_bits) == (8, 8)
    for split in ("train", "val", "test"):
        pairs = [[getattr(data, split)[1, i][0] for data in (five, eight)] for i in range(20)]
        assert all(torch.equal(a, b // 8) for a, b in pairs)
        assert {a.dtype for a, _ in pairs} == {torch.uint8}
    assert max(int(five.train[0, i][0].max()) for i in range(40)) == 31


@pytest.mark.parametrize("size", [0, -1, 68, 100_000, 2.5])
def test_photos_of_an_impossible_size(size):
    """The constructor refuses it: a model of that size would be built before the data are read."""
    with pytest.raises(ValueError, match=f"data.size={size} .* give 1 to {LARGEST_SIZE}") as error:
        Photos(8, size=size)
    one_line(error)


def test_the_largest_crop_is_as_wide_as_the_narrowest_region():
    widths = [region(p, split).shape[1] for p in photographs() for split in REGIONS]
    assert min(widths) == LARGEST_SIZE
    assert made_photos(size=LARGEST_SIZE).shape == (3, LARGEST_SIZE, LARGEST_SIZE)


# ----------------------------------------------------------------------------- two moons


def made_moons(**arguments):
    data = TwoMoons(
        **({"batch_size": 100, "n_train": 4000, "n_val": 500, "n_test": 1000} | arguments)
    )
    data.setup()
    return data


def test_moons_lie_around_their_arcs():
    """The distance to the nearest arc is |N(0, .05)|, except beyond the ends of the arcs."""
    angle = np.linspace(0, np.pi, 2000)
    arcs = np.concatenate(
        [[np.cos(angle), np.sin(angle)], [1 - np.cos(angle), 0.5 - np.sin(angle)]], axis=1
    ).T
    points = made_moons().train.points
    distance = torch.cdist(points.double(), torch.from_numpy(arcs)).min(1).values
    assert distance.square().mean().sqrt().item() == pytest.approx(0.05, rel=0.04)
    exact = made_moons(noise=0.0).train.points.double()
    assert torch.cdist(exact, torch.from_numpy(arcs)).min(1).values.max() < 1e-3


def test_moons_splits_and_types():
    data = made_moons()
    assert (data.n_bits, data.dequantizer, data.shape) == (None, None, (2,))
    assert [len(s.points) for s in (data.train, data.val, data.test)] == [4000, 500, 1000]
    assert {s.points.dtype for s in (data.train, data.val, data.test)} == {torch.float32}
    rows = [{tuple(p) for p in s.points.tolist()} for s in (data.train, data.val, data.test)]
    assert rows[0].isdisjoint(rows[1])
    assert rows[1].isdisjoint(rows[2])
    assert rows[0].isdisjoint(rows[2])
    assert torch.equal(made_moons().train.points, data.train.points)
    assert not torch.equal(made_moons(seed=1).train.points, data.train.points)
    points, indices = next(iter(data.val_dataloader()))
    assert torch.equal(points, data.val.points[:100])
    assert indices.tolist() == list(range(100))


# ----------------------------------------------------------------------------- every datamodule

SMALL = {
    "cifar10": {},
    "fashion_mnist": {},
    "folder": {"size": 4},
    "mnist": {},
    "photos": {"n_train": 200, "n_test": 40},
    "two_moons": {"n_train": 200, "n_test": 40},
}


FROM_FILES = ("cifar10", "fashion_mnist", "folder", "mnist")


def small(name, cifar, **arguments):
    """A small data set of 200 data for training and validation."""
    root = {}
    if name == "folder":
        n_val = arguments.pop("n_val")
        images = cifar.root / f"{n_val} for validation"
        if not images.exists():
            make_split_folder(images, 200 - n_val, n_val, 40, height=4, width=6)
        root = {"root": images, "cache": cifar.root / "cache"}
    elif name in FROM_FILES:
        root = {"root": cifar.root, "download": False}
    data = make_data(name, **({"seed": 0, "batch_size": 8, **SMALL[name], **root} | arguments))
    data.prepare_data()
    data.setup()
    return data


RANGES = [
    ("batch_size", (0, -1, 1.5, True), "of at least 1"),
    ("micro_batch", (0, -2, True), "of at least 1"),
    ("num_workers", (-1, 1.5, 10**6), "from 0 to"),
    ("seed", (-1, 0.5), "of at least 0"),
]
COUNTS = [
    ("n_train", (0, -1), "of at least 1"),
    ("n_val", (-1, 2.5, True), "of at least 0"),
    ("n_test", (0, -1), "of at least 1"),
]


@pytest.mark.parametrize("name", DATA)
def test_values_out_of_their_range_are_one_line(name):
    """The constructor refuses them, before any data are read."""
    required = {"root": "nowhere"} if name in FROM_FILES else {}
    counts = COUNTS if name not in FROM_FILES else []
    for key, values, request in RANGES + counts:
        for value in values:
            arguments = {"batch_size": 8, "seed": 0, **required, key: value}
            with pytest.raises(ValueError, match=rf"{key}={value} is out of range") as error:
                make_data(name, **arguments)
            assert (
                one_line(error).endswith(f"give a whole number {request}") or key == "num_workers"
            )
            assert request in one_line(error)


def test_counts_may_be_ints_of_numpy():
    """As in a notebook that goes through np.arange."""
    two = np.int64(2)
    assert make_data("two_moons", batch_size=two, seed=two, n_train=two).batch_size == 2
    assert made_photos(size=two, n_bits=two).shape == (3, 2, 2)
    flow = Glow((3, 4, 4), n_levels=two, depth=two, hidden_channels=two)
    assert DensityModule(flow, None, None, seed=two, warmup_steps=two).warmup_steps == 2


@pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf"), True])
def test_an_impossible_deviation_is_refused(noise):
    with pytest.raises(
        ValueError, match=rf"data\.noise={noise} is not a standard deviation"
    ) as error:
        TwoMoons(8, noise=noise)
    one_line(error)


@pytest.mark.parametrize("name", ["photos", "two_moons"])
@pytest.mark.parametrize("key", ["n_train", "n_val", "n_test"])
def test_more_data_than_fit_into_memory_are_refused(name, key):
    with pytest.raises(
        ValueError, match=rf"data\.{key}={10**13} .* GiB of memory: give smaller"
    ) as e:
        make_data(name, seed=0, batch_size=8, **{key: 10**13})
    one_line(e)


@pytest.mark.parametrize("name", ["photos", "two_moons"])
def test_a_batch_that_is_larger_than_the_training_set_is_refused(name):
    with pytest.raises(ValueError, match=r"data\.batch_size=65 does not fit the 64 training items"):
        make_data(name, seed=0, batch_size=65, n_train=64)
    assert make_data(name, seed=0, batch_size=64, n_train=64).batch_size == 64


def test_moons_take_any_seed():
    """scikit-learn takes none above 2^32 - 1."""
    points = made_moons(seed=2**40, n_train=100).train.points
    assert torch.equal(points, made_moons(seed=2**40, n_train=100).train.points)


@pytest.mark.parametrize("name", DATA)
def test_loaders(name, cifar):
    data = small(name, cifar, n_val=30)
    train = data.train_dataloader()
    train.sampler.set_epoch(2)
    indices = torch.cat([i for _, i in train]).tolist()
    assert len(indices) == len(set(indices)) == data.n_train // 8 * 8
    for split, evaluation in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        batches = list(evaluation)
        whole = getattr(data, split)
        assert torch.cat([i for _, i in batches]).tolist() == list(range(len(whole)))
        assert torch.equal(
            torch.cat([x for x, _ in batches]),
            torch.stack([whole[0, i][0] for i in range(len(whole))]),
        )
        assert batches[0][0].shape[1:] == data.shape


@pytest.mark.parametrize("name", DATA)
def test_loaders_of_two_ranks(name, cifar):
    alone = small(name, cifar, n_val=31)
    ranks = [small(name, cifar, n_val=31) for _ in range(2)]
    for rank, data in enumerate(ranks):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
    for one, *two in zip(
        alone.train_dataloader(), *(d.train_dataloader() for d in ranks), strict=True
    ):
        assert [len(x) for x, _ in two] == [4, 4]
        assert torch.equal(torch.cat([x for x, _ in two]), one[0])
        assert torch.equal(torch.cat([i for _, i in two]), one[1])
    shards = [torch.cat([i for _, i in d.val_dataloader()]).tolist() for d in ranks]
    assert sorted(shards[0] + shards[1]) == list(range(31))


@pytest.mark.parametrize("name", FROM_FILES)
def test_missing_files_end_all_processes(name, tmp_path, monkeypatch):
    """One process of each machine looks for files. The others would wait for it for ever."""
    settings = {"seed": 0, "batch_size": 8, "root": tmp_path / "nowhere"}
    if name != "folder":
        settings["download"] = False
    alone = make_data(name, **settings)
    with pytest.raises(FileNotFoundError) as error:
        alone.prepare_data()
    line = one_line(error)
    ranks = [make_data(name, **settings) for _ in range(2)]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    sent = []
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda texts, own: sent.append(own))
    ranks[0].prepare_data()
    for rank in ranks:
        rank._raise_problems()
    assert sent == [line, None]

    def gather(texts, own):
        texts[:] = sent

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for rank in ranks:
        with pytest.raises(SharedError) as error:
            rank.setup()
        assert one_line(error) == line


@pytest.mark.parametrize("kind", [SharedError, AgreedError])
@pytest.mark.parametrize(("rank", "code"), [(0, "error: no files"), (1, 0)])
def test_one_process_says_what_all_have_noticed(rank, code, kind, monkeypatch):
    @command
    def main():
        raise kind("no files")

    monkeypatch.setattr(rank_zero_only, "rank", rank, raising=False)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == code


@pytest.mark.parametrize("name", sorted(DATA.keys() - {"folder"}))  # it has no data.n_val
def test_no_validation_set(name, cifar):
    """data.n_val=0 is for a final run, whatever the data set."""
    data = small(name, cifar, n_val=0)
    assert data.val_dataloader() == []
    assert data.n_train == 200


@pytest.mark.parametrize(
    ("n", "batches", "size"), [(20, 3, 8), (24, 3, 8), (5, 1, 5), (10_000, 25, 8)]
)
def test_train_batches(cifar, n, batches, size):
    data = small("cifar10", cifar, n_val=0)
    batches_read = list(data.train_batches(n))
    assert [len(x) for x, _ in batches_read] == [size] * batches
    assert same(batches_read, list(data.train_batches(n)))
    shares = []
    for rank in range(2):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        shares.append(list(data.train_batches(n)))
    together = [
        [torch.cat(parts) for parts in zip(*pair, strict=True)]
        for pair in zip(*shares, strict=True)
    ]
    if size == 5:  # does not share evenly
        assert [len(x) for x, _ in together] == [4, 4]
    else:
        assert same(batches_read, together)
        assert same(
            batches_read, list(small("cifar10", cifar, n_val=0).train_dataloader())[:batches]
        )


@pytest.mark.parametrize("name", DATA)
def test_initialization_batch_is_the_start_of_the_first_epoch(name, cifar):
    data = small(name, cifar, seed=4, n_val=31)
    state = torch.get_rng_state()
    batch = data.initialization_batch(20)
    assert torch.equal(torch.get_rng_state(), state)
    order = np.random.default_rng([4, 0]).permutation(data.n_train)
    assert batch[1].tolist() == order[:20].tolist()
    assert torch.equal(batch[0], torch.stack([data.train[0, i][0] for i in batch[1].tolist()]))
    batches = list(data.train_dataloader())[:2]
    assert same(
        [[part[:16] for part in batch]],
        [[torch.cat(parts) for parts in zip(*batches, strict=True)]],
    )
    for rank in range(4):
        other = small(name, cifar, seed=4, n_val=31, batch_size=16, micro_batch=2)
        other.trainer = SimpleNamespace(global_rank=rank, world_size=4)
        assert same([other.initialization_batch(20)], [batch])
    assert data.initialization_batch(10**6)[1].tolist() == order.tolist()  # all there are


def test_initialization_batch_with_labels(cifar):
    data = small("cifar10", cifar, n_val=0, labels=True)
    images, indices, labels = data.initialization_batch(20)
    assert (images.dtype, indices.dtype, labels.dtype) == (torch.uint8, torch.int64, torch.int64)
    assert labels.tolist() == [cifar.train_labels[i] for i in indices.tolist()]
    assert same([[images, indices]], [small("cifar10", cifar, n_val=0).initialization_batch(20)])


# ----------------------------------------------------------------------------- noise


def test_evaluation_noise_depends_on_the_image_alone():
    shape = (3, 8, 8)
    noise = image_noise(torch.arange(20), shape, seed=5)
    assert noise.dtype == torch.float32
    assert noise.shape == (20, *shape)
    assert torch.equal(
        torch.cat([image_noise(i, shape, 5) for i in torch.arange(20).split(7)]), noise
    )
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(image_noise(shuffled, shape, 5), noise[shuffled])
    torch.rand(3)  # whatever was drawn before
    assert torch.equal(image_noise(torch.arange(20), shape, 5), noise)
    assert torch.equal(image_noise(torch.tensor([4]), shape, 5, k=0)[0], noise[4])
    others = [
        image_noise(torch.arange(20), shape, 6),
        image_noise(torch.arange(20), shape, 5, k=1),
        noise.roll(1, 0),
    ]
    assert all((noise != other).float().mean() > 0.99 for other in others)
    assert 0 <= noise.min() < noise.max() < 1


def test_evaluation_noise_is_uniform():
    noise = image_noise(torch.arange(200), (3, 32, 32), seed=0).double()
    assert noise.mean().item() == pytest.approx(0.5, abs=2e-3)  # five standard errors
    assert noise.var().item() == pytest.approx(1 / 12, abs=1e-3)


def training_inputs(world_size, rank, data, epoch=0, batch_idx=0, seed=0, n_micro=1):
    module = DensityModule(RealNVP2d(hidden_channels=4), UniformDequantizer(8), 8, seed)
    module.trainer = SimpleNamespace(
        world_size=world_size,
        global_rank=rank,
        accumulate_grad_batches=n_micro,
        current_epoch=epoch,
    )
    return module.training_input([data], module.position(batch_idx)).x


def test_training_noise_is_the_same_for_ranks_and_micro_batches():
    data = torch.from_numpy(random_images(64))
    alone = training_inputs(1, 0, data, epoch=3, batch_idx=7)
    halves = [training_inputs(2, rank, data[32 * rank : 32 * rank + 32], 3, 7) for rank in range(2)]
    assert torch.equal(torch.cat(halves), alone)
    # Two ranks accumulate two micro-batches each: batches 14 and 15 belong to step 7.
    quarters = [
        training_inputs(2, rank, data[32 * rank + 16 * part :][:16], 3, 14 + part, n_micro=2)
        for rank in range(2)
        for part in range(2)
    ]
    assert torch.equal(torch.cat(quarters), alone)
    assert torch.equal((alone * 256).floor(), data.float())
    zeros = torch.zeros(32, 3, 8, 8, dtype=torch.uint8)
    assert not torch.equal(training_inputs(2, 0, zeros), training_inputs(2, 1, zeros))


def test_training_noise_is_keyed_by_seed_epoch_and_batch():
    data = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1)]
    noises = [training_inputs(1, 0, data, epoch, batch, seed) * 256 for seed, epoch, batch in keys]
    for i, noise in enumerate(noises):
        assert all((noise != other).float().mean() > 0.99 for other in noises[:i])
        assert noise.mean().item() == pytest.approx(0.5, abs=0.013)  # five standard errors
        assert noise.var().item() == pytest.approx(1 / 12, abs=0.005)
        assert 0 <= noise.min() < noise.max() < 1
    key = (64, 3, 8, 8), 1, 0, 1, torch.device("cpu")
    assert torch.equal(batch_noise(*key), batch_noise(*key))
    assert torch.equal(noises[-1], batch_noise(*key))
