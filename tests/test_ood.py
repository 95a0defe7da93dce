"""reproduce.ood: other sets of images, scores and their AUROC, the recorded figures, the page."""

import hashlib
import io
import itertools
import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace

import idx_files
import numpy as np
import pytest
import torch
from image_folders import save_image
from PIL import Image
from test_glow_scripts import run

from reproduce import detection, load, ood, ood_sets, score
from reproduce.model import TrainedModel
from reproduce.ood_sets import Missing, Request, fitted
from results import ood as page
from results.blocks import Code, Drawing, Heading, Paragraph, Table
from results.drawing import svg

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data"
RANDOM = np.random.default_rng(0)

# ---------------------------------------------------------------------- scores and their AUROC


def by_pairs(inside, outside):
    """AUROC and DeLong's standard error as they are defined, from all pairs."""
    wins = (outside[:, None] > inside) + 0.5 * (outside[:, None] == inside)
    of_outside = wins.mean(1)
    of_inside = wins.mean(0)
    variance = of_outside.var(ddof=1) / len(outside) + of_inside.var(ddof=1) / len(inside)
    return wins.mean(), math.sqrt(variance)


@pytest.mark.parametrize("step", [0.0, 0.5])  # with ties where the scores are multiples of a step
def test_auroc_and_its_interval_are_those_of_all_pairs(step):
    inside = RANDOM.normal(size=60)
    outside = RANDOM.normal(0.7, 2, size=45)
    if step:
        inside = np.round(inside / step)
        outside = np.round(outside / step)
    area, error = by_pairs(inside, outside)
    found = detection.auroc(inside, outside)
    assert found.value == pytest.approx(area, abs=1e-12)
    assert found.high - found.value == pytest.approx(1.96 * error, rel=1e-4)
    assert found.value - found.low == pytest.approx(1.96 * error, rel=1e-4)


def test_auroc_by_hand():
    # Of the 6 pairs the outside score is larger in 3 and equal in 1.
    found = detection.auroc(np.array([1.0, 2.0, 4.0]), np.array([2.0, 3.0]))
    assert found.value == pytest.approx(3.5 / 6)
    apart = detection.auroc(np.array([1.0, 2.0]), np.array([3.0, 4.0, 5.0]))
    assert apart == (1.0, 1.0, 1.0)
    assert detection.auroc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == (0.0, 0.0, 0.0)


def test_auroc_covers_the_truth_as_often_as_it_says():
    truth = 0.760249939  # of N(1, 1) against N(0, 1): Phi(1 / sqrt 2)
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        found = detection.auroc(random.normal(size=80), random.normal(1, size=50))
        covered += found.low < truth < found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_scores_that_are_not_finite_count_as_larger_than_all_others():
    outside = np.array([np.nan, np.inf, 0.0, -np.inf])
    assert detection.auroc(np.array([1.0, 1e308]), outside).value == 0.75
    assert detection.auroc(outside, np.array([1.0, 1e308])).value == 0.25


def test_typicality_by_hand():
    bits = np.array([3.0, 5.0, 1.0, 1.5, 4.0, 9.0, 100.0])
    assert detection.typicality(bits, 3.5, 1) == pytest.approx([0.5, 1.5, 2.5, 2, 0.5, 5.5, 96.5])
    assert detection.typicality(bits, 3.5, 2) == pytest.approx([0.5, 2.25, 3.0])
    assert detection.typicality(bits, 3.5, 8).shape == (0,)
    far = detection.typicality(np.array([1.0, np.nan, 3.0, 4.0]), 3.5, 2)
    assert far.tolist() == [np.inf, 0.0]


def test_a_threshold_passes_99_percent_of_the_models_own_batches():
    bits = np.random.default_rng(2).normal(3, 1, 20_000)
    for m in (1, 25):
        found = detection.threshold(bits, 3.0, m, seed=0)
        assert found == pytest.approx(2.5758 / math.sqrt(m), rel=0.05)
        assert found == detection.threshold(bits, 3.0, m, seed=0)
    assert detection.threshold(bits, 4.0, 25, seed=0) > 1  # with a wrong entropy


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr

    a = np.round(RANDOM.normal(size=50), 1)
    b = a + np.round(RANDOM.normal(size=50), 1)
    assert detection.rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert detection.rank_correlation(np.array([1, 2, np.nan, 3]), np.array([2, 4, 0, 9])) == 1
    assert detection.rank_correlation(np.ones(5), a[:5]) is None
    assert detection.rank_correlation(a[:1], a[:1]) is None


def test_a_histogram_counts_every_score_and_far_ones_at_its_ends():
    inside = np.linspace(0, 1, 1001)
    found = detection.histogram(inside, np.array([1e12, 2.0, -5.0, np.nan]))
    assert (found.low, found.high) == pytest.approx((0.005 - 2.97, 0.995 + 2.97))
    assert sum(found.inside) == 1001
    assert (sum(found.outside), found.outside[0], found.outside[-1]) == (3, 1, 1)
    assert detection.histogram(inside, np.array([np.inf])) is None
    same = detection.histogram(np.ones(3), np.ones(2))
    assert (same.low, same.high, same.inside[0], same.outside[0]) == (1, 2, 3, 2)


def test_a_compressed_image_has_all_its_bits_and_a_file_of_the_measured_size():
    pixels = RANDOM.integers(0, 256, (3, 8, 8), dtype=np.uint8)
    for compressor, settings in score.COMPRESSORS.items():
        stream = io.BytesIO()
        Image.fromarray(pixels.transpose(1, 2, 0)).save(stream, **settings)
        assert np.array_equal(np.asarray(Image.open(stream)).transpose(2, 0, 1), pixels)
        bits = score.compressed_bits_per_dim(pixels, 8, compressor)
        assert bits == 8 * len(stream.getvalue()) / 192
        assert score.compressed_bits_per_dim(pixels, 1, compressor) < bits
        assert score.compressed_bits_per_dim(pixels[:1], 8, compressor) > 0


# ---------------------------------------------------------------------- sets


def request(root, shape=(3, 32, 32), n=100, **keys):
    return Request(shape, n, 0, Path(root), **keys)


def as_set(images):
    """The images of a set in an order of their own, to be compared."""
    return sorted(image.tobytes() for image in images)


def test_svhn_is_read_from_its_official_file(tmp_path, monkeypatch):
    from scipy.io import savemat

    images = RANDOM.integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    path = tmp_path / "SVHN" / "test_32x32.mat"
    path.parent.mkdir()
    savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": np.ones(5)})
    with pytest.raises(ValueError, match=r"is damaged or another file .*official md5") as error:
        ood_sets.svhn(request(tmp_path))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"put the official file there$"):  # none can be fetched
        ood_sets.read_sets(["svhn"], request(tmp_path), "cifar10")
    monkeypatch.setattr(ood_sets, "SVHN_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    found = ood_sets.svhn(request(tmp_path))
    assert as_set(found.images) == as_set(images)
    assert (found.title, found.preparation) == ("SVHN test", "as they are")
    assert len(ood_sets.svhn(request(tmp_path, n=2)).images) == 2


class Trap:
    """It runs code when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle was read')",)


@pytest.mark.parametrize(
    ("name", "file", "table"),
    [
        ("cifar100", "cifar-100-python/test", "CIFAR100_MD5"),
        ("cifar10", "cifar-10-batches-py/test_batch", "TEST_MD5"),
    ],
)
def test_a_pickle_is_read_only_if_it_is_the_official_one(name, file, table, tmp_path, monkeypatch):
    read = ood_sets.SETS[name]
    path = tmp_path / file
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="is damaged or another file"):
        read(request(tmp_path))
    images = RANDOM.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    path.write_bytes(pickle.dumps({b"data": images.reshape(4, -1)}))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(ood_sets, table, {"test_batch": md5} if table == "TEST_MD5" else md5)
    assert as_set(read(request(tmp_path)).images) == as_set(images)


def test_digits_get_a_black_frame_in_three_channels(tmp_path, monkeypatch):
    official = idx_files.make_official(monkeypatch, 2, 6)
    idx_files.write(tmp_path / "MNIST" / "raw", official.contents)
    digits = official.test
    found = ood_sets.mnist(request(tmp_path))
    expected = np.zeros((6, 3, 32, 32), np.uint8)
    expected[:, :, 2:30, 2:30] = digits[:, None]
    assert as_set(found.images) == as_set(expected)
    assert found.preparation == (
        "grey repeated in three channels, a black frame around 28x28 pixels"
    )
    as_it_is = ood_sets.mnist(request(tmp_path, (1, 28, 28)))
    assert as_set(as_it_is.images) == as_set(digits[:, None])
    larger = ood_sets.mnist(request(tmp_path, (3, 64, 64)))
    assert larger.images.shape == (6, 3, 64, 64)
    assert larger.preparation.endswith("resized from 28x28 (bicubic)")
    with pytest.raises(Missing, match=r"put t10k-images-idx3-ubyte.gz .* into .*FashionMNIST/raw/"):
        ood_sets.fashion_mnist(request(tmp_path / "empty"))


def test_images_fit_by_luma_and_pillows_bicubic_filter():
    image = RANDOM.integers(0, 256, (1, 3, 32, 32), dtype=np.uint8)
    grey, words = fitted(image, (1, 32, 32))
    assert words == "as luma"
    luma = np.einsum("c,chw->hw", [0.299, 0.587, 0.114], image[0])
    assert np.abs(grey[0, 0] - luma).max() <= 1
    small, words = fitted(image, (3, 16, 16))
    assert words == "resized from 32x32 (bicubic)"
    picture = Image.fromarray(image[0].transpose(1, 2, 0))
    expected = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(small[0].transpose(1, 2, 0), expected)
    assert fitted(image, (3, 32, 32))[0] is image


def places(crops):
    """Row and column of the first pixel of crops from `photograph`."""
    return {(int(crop[0, 0, 0]), int(crop[1, 0, 0])) for crop in crops}


def photograph(path, height, width, **settings):
    """Save a picture whose pixels are (row, column, 7)."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = np.arange(height)[:, None]
    pixels[:, :, 1] = np.arange(width)
    pixels[:, :, 2] = 7
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **settings)


def test_crops_of_photographs_are_not_resized_and_do_not_overlap(tmp_path):
    photograph(tmp_path / "BSDS500" / "a.png", 35, 50)
    found = ood_sets.bsds(request(tmp_path, (3, 8, 8), n=1000))
    assert places(found.images) == set(itertools.product(range(0, 32, 8), range(0, 48, 8)))
    assert len(found.images) == 24
    first = found.images[0]
    assert np.array_equal(first[0], first[0, 0, 0] + np.arange(8)[:, None] + np.zeros((8, 8)))
    assert (first[2] == 7).all()
    photograph(tmp_path / "BSDS500" / "b.png", 16, 16)
    (tmp_path / "BSDS500" / "c.png").write_text("no image")
    photograph(tmp_path / "BSDS500" / "d.png", 7, 100)  # too low for a crop
    found = ood_sets.bsds(request(tmp_path, (3, 8, 8), n=12))
    assert (len(found.images), found.n_unreadable) == (6, 1)  # three of each photograph
    assert found.preparation == "crops of 3 photographs, not resized"
    given = ood_sets.bsds(request("nowhere", (3, 8, 8), n=12, bsds=str(tmp_path / "BSDS500")))
    assert np.array_equal(given.images, found.images)


def test_a_photograph_is_whole_and_upright(tmp_path):
    pixels = save_image(tmp_path / "a.png", 20, 30)
    assert np.array_equal(ood_sets.read_whole(tmp_path / "a.png", 3), pixels.transpose(2, 0, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    Image.fromarray(pixels).save(tmp_path / "b.png", exif=exif)
    turned = np.rot90(pixels, -1).transpose(2, 0, 1)
    assert np.array_equal(ood_sets.read_whole(tmp_path / "b.png", 3), turned)
    assert ood_sets.read_whole(tmp_path / "a.png", 1).shape == (1, 20, 30)


def test_a_users_folder_is_read_as_score_does(tmp_path):
    for number in range(5):
        save_image(tmp_path / "mine" / f"{number}.png", 20, 30, seed=number)
    (tmp_path / "mine" / "bad.png").write_text("no image")
    found = ood_sets.own_folder(request("nowhere", (3, 8, 8), folder=str(tmp_path / "mine")))
    paths = [tmp_path / "mine" / f"{number}.png" for number in range(5)]
    assert as_set(found.images) == as_set(ood_sets.read_image(path, 3, (8, 8)) for path in paths)
    assert (found.title, found.n_unreadable) == ("mine", 1)


def test_images_that_are_made():
    colours = ood_sets.constant(request(".", (3, 4, 6), n=50)).images
    assert colours.shape == (50, 3, 4, 6)
    assert (colours == colours[:, :, :1, :1]).all()
    assert len(np.unique(colours[:, :, 0, 0], axis=0)) == 50
    grey = ood_sets.constant(request(".", (1, 4, 6), n=500)).images
    assert sorted(grey[:, 0, 0, 0]) == list(range(256))
    noise = ood_sets.noise(request(".", (3, 32, 32), n=100)).images
    assert np.bincount(noise.ravel(), minlength=256) == pytest.approx(1200, abs=6 * 1200**0.5)
    again = ood_sets.noise(request(".", (3, 32, 32), n=100)).images
    assert np.array_equal(noise, again)


def test_missing_sets_say_what_to_do_and_small_ones_why_they_are_left_out(tmp_path):
    save_image(tmp_path / "one" / "a.png")
    asked = request(tmp_path, (3, 8, 8), folder=str(tmp_path / "one"))
    sets, left_out = ood_sets.read_sets(list(ood_sets.SETS), asked, "cifar10")
    assert [each.name for each in sets] == ["constant", "noise"]
    root = f"{tmp_path}/"
    assert left_out == {
        "svhn": f"put test_32x32.mat ({ood_sets.SVHN_URL}) into {root}",
        "cifar10": "these are the model's own data",
        "cifar100": f"unpack cifar-100-python.tar.gz ({ood_sets.CIFAR100_URL}) in {root}",
        "mnist": "put t10k-images-idx3-ubyte.gz "
        f"(https://ossci-datasets.s3.amazonaws.com/mnist/) into {root}MNIST/raw/",
        "fashion_mnist": "put t10k-images-idx3-ubyte.gz "
        f"({ood_sets.FashionMNIST.url}) into {root}FashionMNIST/raw/",
        "bsds": f"put the folder BSDS500 into {root}, or give bsds=FOLDER",
        "folder": "it has 1 images, and 2 are needed",
    }


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def realnvp(tmp_path_factory):
    """The folder of a finished run, of a flow of photographs of 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("runs") / "realnvp"
    run("realnvp_photos", folder, "data.n_test=64")
    return folder


SMALL = ["sets=[constant,noise]", "n=24", "m=4", "device=cpu", "batch_size=16"]


def call(*words):
    ood.main([str(word) for word in words])


def mistake(*words):
    with pytest.raises(SystemExit) as stop:
        call(*words)
    assert isinstance(stop.value.code, str), "exit code 0 for a mistake"
    assert stop.value.code.startswith("error: ")
    assert "\n" not in stop.value.code
    return stop.value.code.removeprefix("error: ")


def test_help_names_every_key_and_set(capsys):
    call("--help")
    text = capsys.readouterr().out
    assert all(f"  {key}=" in text for key in ood.DEFAULTS)
    assert all(f"  {name} " in text for name in ood_sets.SETS)


def test_the_figures_are_those_of_the_models_own_bits(realnvp, tmp_path, capsys):
    out = tmp_path / "figures" / "ood.json"
    call(realnvp, *SMALL, f"out={out}")
    content = page.read(out)
    assert sorted(path.name for path in out.parent.iterdir()) == ["ood.json", "ood.svg"]
    assert out.with_suffix(".svg").read_text() == svg(page.histograms(content))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{out}: constant, noise; histograms in {out.with_suffix('.svg')}"
    assert lines[-2] == page.verdict(content)

    model = load(realnvp)
    config, _ = ood.config_of(model, 0, {})
    asked = request(".", (3, 8, 8), n=24)
    own = ood.own_images(config, asked)
    made = [ood_sets.constant(asked).images, ood_sets.noise(asked).images]
    images = [own.held_out, own.train, own.test, *made]
    held_out, train, test, *others = [
        model.bits_per_dim(each, keys=score.noise_keys(list(each), 0)).double().numpy()
        for each in images
    ]
    assert content["training"]["means"]["bpd"] == pytest.approx(train.mean(), abs=1e-5)
    assert content["inside"]["means"]["bpd"] == pytest.approx(test.mean(), abs=1e-5)
    for name, m in (("typicality_1", 1), ("typicality_m", 4)):
        limit = detection.threshold(held_out, train.mean(), m, 0)
        assert content["thresholds"][name] == pytest.approx(limit, abs=1e-5)
    assert [each["name"] for each in content["sets"]] == ["constant", "noise"]
    for each, bits, pixels in zip(content["sets"], others, made, strict=True):
        assert (each["n"], each["not_finite"]) == (24, 0)
        assert each["auroc"]["likelihood"]["value"] == pytest.approx(by_pairs(test, bits)[0])
        for name in ("png", "webp"):
            files = [
                np.array([score.compressed_bits_per_dim(image, 8, name) for image in some])
                for some in (own.test, pixels)
            ]
            assert each["means"][name] == pytest.approx(files[1].mean(), abs=1e-6)
            area = by_pairs(test - files[0], bits - files[1])[0]
            assert each["auroc"][f"corrected_{name}"]["value"] == pytest.approx(area, abs=1e-6)
        far = [np.abs(some.reshape(6, 4).mean(1) - train.mean()) for some in (test, bits)]
        area = by_pairs(*far)[0]
        assert each["auroc"]["typicality_m"]["value"] == pytest.approx(area, abs=1e-6)
        limit = content["thresholds"]["typicality_m"]
        assert each["flagged"]["typicality_m"] == pytest.approx((far[1] > limit).mean(), abs=1e-6)


def test_the_models_own_images_are_those_of_its_splits_without_augmentation(realnvp):
    config, _ = ood.config_of(load(realnvp), 0, {})
    own = ood.own_images(config, request(".", (3, 8, 8), n=10_000))
    data = ood.make_data(seed=config.seed, **{**config.data, "hflip": False})
    data.setup()
    splits = [data.train, data.val, data.test]
    for images, split in zip(own, splits, strict=True):
        assert as_set(images) == as_set(split[(0, i)][0].numpy() for i in range(len(split)))


def test_a_stopped_command_goes_on_and_a_second_one_writes_the_same(realnvp, tmp_path, monkeypatch):
    call(realnvp, *SMALL, f"out={tmp_path / 'whole.json'}")
    whole = {path.suffix: path.read_bytes() for path in tmp_path.iterdir()}
    bits_per_dim = TrainedModel.bits_per_dim
    calls = []

    def counted(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return bits_per_dim(*arguments, **keywords)

    monkeypatch.setattr(TrainedModel, "bits_per_dim", counted)
    folder = tmp_path / "parts"
    words = [realnvp, *SMALL, f"out={folder / 'whole.json'}"]
    with pytest.raises(SystemExit) as stop:
        call(*words)
    assert stop.value.code == "stopped: the same command keeps what is scored, and goes on"
    assert [path.name for path in folder.iterdir()] == ["whole.json.partial"]
    call(*words)
    assert {path.suffix: path.read_bytes() for path in folder.iterdir()} == whole
    assert len(calls) == 4 + 5 * 2 - 3  # five sets of two batches, of which three were kept
    call(*words)
    assert {path.suffix: path.read_bytes() for path in folder.iterdir()} == whole


def test_missing_sets_are_named_and_the_others_are_compared(realnvp, tmp_path, capsys):
    out = tmp_path / "ood.json"
    words = ["sets=[svhn,noise]", *SMALL[1:], f"root={tmp_path}"]
    call(realnvp, *words, f"out={out}")
    line = capsys.readouterr().out.splitlines()[0]
    assert line == f"svhn is left out: put test_32x32.mat ({ood_sets.SVHN_URL}) into {tmp_path}/"
    content = page.read(out)
    assert (content["left_out"], [each["name"] for each in content["sets"]]) == (
        ["svhn"],
        ["noise"],
    )
    assert str(tmp_path) not in out.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["RUN", "sets=[svnh]"],
            "sets=svnh is not known (did you mean svhn?): give svhn, cifar10,",
        ),
        (["RUN", "sets=[noise,noise]"], "sets=[noise,noise] has a set twice: give each once"),
        (["RUN", "sets=[svhn]", "root=."], "no set is left to compare with: give others"),
        (["RUN", "sets=[folder]", "folder=nowhere"], "there is no folder nowhere"),
        (["RUN", "sets=[bsds]", "bsds=nowhere"], "there is no folder nowhere"),
        (["RUN", "n=1"], "n=1 is out of range: give at least 2"),
        (["RUN", "m=1"], "m=1 is out of range: give at least 2"),
        (["RUN", "out=ood.csv"], "out=ood.csv does not end with .json: give another out="),
        (["RUN", "out=mine.json"], "mine.json is no file of this command: give another out="),
        (["RUN", "out=picture.json"], "picture.svg is in the way of the histograms"),
        (["RUN", "data.sise=8"], "did you mean data.size?"),
        (["RUN", "sests=[noise]"], "did you mean sets?"),
        (["nowhere"], "no model nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    words, message, realnvp, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text('{"my": "own"}')
    Path("picture.svg").touch()
    monkeypatch.setattr(TrainedModel, "to", None)
    assert message in mistake(*[word.replace("RUN", str(realnvp)) for word in words])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.json", "picture.svg"]


def test_a_class_conditional_flow_is_scored_by_the_mean_over_its_classes():
    table = np.array([[3.0, 4.0, 5.0], [3.0, 1.0, 6.0]])  # bits/dim of three images by class

    def bits_per_dim(images, labels, **keywords):
        return torch.from_numpy(table[labels[0]])

    model = SimpleNamespace(class_names=("cat", "dog"), bits_per_dim=bits_per_dim)
    data = [score.Datum(row, np.full((1, 2, 2), row, np.uint8), None) for row in range(3)]
    options = SimpleNamespace(noise_samples=1, seed=0, batch_size=8)
    d = 4
    expected = -np.log2((2 ** (-d * table)).mean(0)) / d
    assert ood.model_bits(model, data, options) == pytest.approx(expected.tolist())


# ---------------------------------------------------------------------- the page


def other(name, png, likelihood, **areas):
    """A set as it is recorded. Areas are single numbers, with intervals of 0.02 around them."""
    auroc = {"likelihood": likelihood, **areas}
    return {
        "name": name,
        "title": name,
        "preparation": "made",
        "unreadable": 0,
        "n": 100,
        "not_finite": 0,
        "means": {"bpd": 3.0, "png": png},
        "medians": {"bpd": 3.0, "png": png},
        "auroc": {
            key: {"value": value, "low": value - 0.01, "high": value + 0.01}
            for key, value in auroc.items()
        },
        "flagged": {"typicality_1": 0.5, "typicality_m": None},
        "histograms": {"likelihood": {"low": 1, "high": 3, "inside": [1, 2], "outside": [0, 3]}},
    }


def recorded(*sets, **facts):
    """A whole content of one file, of 100 own test images of 5 bits/dim as PNG."""
    scored = {
        "n": 100,
        "not_finite": 0,
        "means": {"bpd": 3.5, "png": 5.0},
        "medians": {"bpd": 3.5, "png": 5.0},
    }
    flagged = {"typicality_1": 0.01, "typicality_m": 0.0}
    return {
        "kind": "ood",
        "model": "glow_cifar10/cpu-seed0",
        "experiment": "glow_cifar10",
        "data": "cifar10",
        "weights": "abc",
        "command": "python -m reproduce.ood glow_cifar10/cpu-seed0",
        "n": 100,
        "m": 10,
        "seed": 0,
        "commit": "0123456789",
        "dirty": False,
        "device": "a CPU",
        "versions": {"torch": "2"},
        "training": scored,
        "held_out": scored,
        "thresholds": {"typicality_1": 0.6, "typicality_m": 0.2},
        "inside": scored | {"flagged": flagged, "rank_correlation": {"png": 0.8}},
        "sets": list(sets),
        "left_out": ["svhn"],
    } | facts


RANKS = (
    "Among the model's own test images the rank correlation of bits/dim with the bits/dim of the "
    "PNG file is 0.80."
)


def test_a_verdict_on_a_failure_that_is_cured_for_one_set():
    content = recorded(
        other("flat", 0.3, 0.02, corrected_png=0.98, typicality_1=0.3, typicality_m=0.9),
        other("digits", 1.2, 0.1, corrected_png=0.4, typicality_1=0.5, typicality_m=0.8),
        other("noise", 8.0, 1.0, corrected_png=0.5, typicality_1=0.9, typicality_m=1.0),
        other("houses", 4.0, 0.7, corrected_png=0.9, typicality_1=0.9, typicality_m=1.0),
    )
    assert page.verdict(content) == (
        "The known failure of likelihood appears: simpler images are more likely than the model's "
        "own test images, by AUROC flat (0.020) and digits (0.100); of the simpler sets houses "
        "(0.700) are not. "
        "The correction by PNG cures it for flat (0.980), does not cure digits (0.400) and no "
        "longer finds noise (0.500), which likelihood does. "
        "Typicality of single images does not cure flat (0.300) and digits (0.500). "
        "Typicality of batches of 10 cures it for flat (0.900) and lessens it for digits (0.800). "
        f"{RANKS}"
    )


def test_a_verdict_says_nothing_of_batches_where_there_were_too_few_images():
    flat = other("flat", 0.3, 0.02, corrected_png=0.98, typicality_1=0.95)
    noise = other("noise", 8.0, 1.0, corrected_png=1.0, typicality_1=1.0)
    flat["auroc"]["typicality_m"] = None
    noise["auroc"]["typicality_m"] = None
    text = page.verdict(recorded(flat, noise))
    assert "Typicality of single images cures it for flat (0.950)." in text
    assert "batches" not in text


def test_a_verdict_without_a_failure_or_without_simpler_images():
    better = other("flat", 0.3, 0.9, corrected_png=1.0, typicality_1=1.0, typicality_m=1.0)
    assert page.verdict(recorded(better)) == (
        "The known failure of likelihood does not appear: no simpler set is more likely than the "
        f"model's own test images, by AUROC flat (0.900). {RANKS}"
    )
    even = other("flat", 0.3, 0.495, corrected_png=1.0, typicality_1=1.0, typicality_m=1.0)
    assert "does not appear" in page.verdict(recorded(even))  # the interval holds 0.5
    complex_one = other("noise", 8.0, 1.0, corrected_png=1.0, typicality_1=1.0, typicality_m=1.0)
    assert page.verdict(recorded(complex_one)).startswith("No set is simpler than the model's own")


def put(root, content, name="a"):
    path = root / "ood" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_the_section_has_a_verdict_a_table_and_a_picture_for_each_file(tmp_path):
    assert page.section(tmp_path) == []
    content = recorded(
        other("flat", 0.3, 0.02, corrected_png=0.98, typicality_1=0.3) | {"not_finite": 3}
    )
    content["sets"][0]["means"]["bpd"] = 1234.5
    content["sets"][0]["medians"]["bpd"] = 12.25
    put(tmp_path, content)
    blocks = page.section(tmp_path)
    assert [block.text for block in blocks if isinstance(block, Heading)] == [
        page.TITLE,
        "glow_cifar10/cpu-seed0",
    ]
    [table] = [block for block in blocks if isinstance(block, Table)]
    assert list(table.columns) == [
        *("images", "n", "bits/dim", "as PNG", "AUROC of likelihood", "corrected by PNG"),
        *("typicality, m=1", "typicality, m=10", "beyond the limit, m=1", "m=10"),
    ]
    dashes = ["-"] * 4
    assert table.rows == [
        ["**cifar10, its own test**", "100", "3.500", "5.000", *dashes, "1.0%", "0.0%"],
        [
            *("flat (made)", "100 (3 not finite)", "1.2e+03 (median 12.25)", "0.300"),
            *("0.020 (0.010 to 0.030)", "0.980 (0.970 to 0.990)", "0.300 (0.290 to 0.310)", "-"),
            *("50.0%", "-"),
        ],
    ]
    texts = [block.text for block in blocks if isinstance(block, Paragraph)]
    assert page.verdict(content) in texts
    assert texts[-1] == page.QUOTED["svhn"]
    assert "Commit 0123456, a CPU. Left out: svhn." in texts
    assert any("batches of 10 beyond 0.200 bits/dim: 0.0% of its own test" in t for t in texts)
    [picture] = [block for block in blocks if isinstance(block, Drawing)]
    assert picture.file == "ood/a.svg"
    assert [block.text for block in blocks if isinstance(block, Code)] == [content["command"]]


def test_a_quoted_figure_leaves_the_page_when_its_set_is_measured(tmp_path):
    put(tmp_path, recorded(other("svhn", 4.0, 0.07)))
    texts = [block.text for block in page.section(tmp_path) if isinstance(block, Paragraph)]
    assert page.QUOTED["svhn"] not in texts
    assert "quoted from memory" in page.QUOTED["svhn"]


def test_a_damaged_file_is_one_line(tmp_path):
    path = put(tmp_path, recorded(other("flat", 0.3, 0.02)) | {"m": "ten"})
    message = f"{path} is not what reproduce.ood writes (no usable m): restore it, or delete it"
    with pytest.raises(ValueError, match="restore it") as error:
        page.section(tmp_path)
    assert str(error.value) == message
    path.write_text("{")
    with pytest.raises(ValueError, match="is not what reproduce"):
        page.section(tmp_path)


def test_a_histogram_is_drawn_as_steps():
    counts = {"low": 0, "high": 2, "inside": [1, 2], "outside": [0, 4]}
    inside, outside, *_ = page.panel(counts, (10.0, 0.0), 100.0)
    bottom = page.PANEL - page.AXIS_ROOM
    top = page.TITLE_ROOM + 4
    middle = (bottom + top) / 2
    assert inside.points == (
        *((10, bottom), (10, middle), (60, middle)),
        *((60, top), (110, top), (110, bottom)),
    )
    assert outside.points[1:3] == ((10, bottom), (60, bottom))


def test_the_recorded_figures_have_their_pictures_and_no_path_of_a_machine():
    files = page.read_all()
    assert files
    for name, content in files.items():
        path = ROOT / "results" / "ood" / f"{name}.json"
        assert path.with_suffix(".svg").read_text() == svg(page.histograms(content))
        assert not content["dirty"]
        assert "/work" not in path.read_text()
        assert content["inside"]["n"] == 10_000


@pytest.mark.data
@pytest.mark.skipif(not (DATA / "cifar-10-batches-py").is_dir(), reason="no CIFAR-10 under data/")
def test_the_failure_appears_on_real_images(tmp_path):
    """The shipped Glow finds images of one colour more likely than those of CIFAR-10."""
    words = ["sets=[constant,noise]", "n=200", "device=cpu", f"data.root={DATA}"]
    call("glow_cifar10/cpu-seed0", *words, f"out={tmp_path / 'a.json'}")
    flat, noise = page.read(tmp_path / "a.json")["sets"]
    assert flat["auroc"]["likelihood"]["high"] < 0.2
    assert flat["auroc"]["corrected_webp"]["low"] > 0.95
    assert noise["auroc"]["likelihood"]["low"] > 0.95
