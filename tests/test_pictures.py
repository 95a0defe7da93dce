"""reproduce.pictures: what is done to latents, by values; the command on a tiny run; mistakes."""

import numpy as np
import pytest
import torch
from cases import MODELS, TINY, trained
from PIL import Image

from datamodules import DATA, Photos
from datamodules.images import ImageArray
from flows.context import Classes
from flows.realnvp import RealNVP
from lightning_modules.callbacks.samples import margin
from lightning_modules.noise import image_noise
from reproduce import load, pictures, realnvp_cifar10, realnvp_moons
from reproduce.config import override
from reproduce.pictures import attribute_direction, interpolate, keep_levels, move

CASE = next(case for case in MODELS if case.name == "RealNVP-3scales")
NAMES = ("ape", "bee", "cat")
N_TRAIN = 64  # these as TINY has them
N_TEST = 40
SIZE = 8


class Labelled(Photos):
    """Photos of three classes, the index modulo 3; the higher a class, the brighter its images."""

    class_names = NAMES
    n_classes = len(NAMES)

    def __init__(self, labels=False, **arguments):
        super().__init__(**arguments)
        self.labels = labels

    def setup(self, stage=None):
        super().setup(stage)
        for split, n in (("train", N_TRAIN), ("test", N_TEST)):
            labels = np.arange(n) % 3
            images = np.stack(
                [getattr(self, split)[0, i][0].numpy() // 4 + 64 * labels[i] for i in range(n)]
            )
            if not self.labels:
                labels = None
            setattr(self, split, ImageArray(images.astype(np.uint8), labels=labels))


class Conditional(RealNVP):
    """p(x | class): the class is added to the coarsest latent."""

    conditioned_on = Classes(len(NAMES))

    def forward(self, x, context=None):
        (*latents, z), log_det = super().forward(x, context)
        return (*latents, z - self.encoded(context)[:, None, None, None]), log_det

    def inverse(self, z, context=None):
        return super().inverse(
            (*z[:-1], z[-1] + self.encoded(context)[:, None, None, None]), context
        )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    realnvp_cifar10.main(
        override([*TINY, f"run_dir={folder}", "trainer.max_steps=3"], ["samples.n=1"])
    )
    return folder


@pytest.fixture
def labelled(monkeypatch):
    monkeypatch.setitem(DATA, "photos", Labelled)


@pytest.fixture
def conditional(monkeypatch, labelled):
    def read(folder):
        model = load(folder)
        other = Conditional(model.shape, n_scales=2, hidden_channels=4, n_blocks=1).eval()
        other.load_state_dict(model.flow.state_dict())
        model.flow = other
        return model

    monkeypatch.setattr(pictures, "load_model", read)


def draw(*words):
    pictures.main([str(word) for word in words])


def mistake(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        draw(*words)
    assert isinstance(stop.value.code, str), "exit code 0 for a mistake"
    assert stop.value.code.startswith("error: ")
    assert "\n" not in stop.value.code
    assert "Traceback" not in capsys.readouterr().err
    return stop.value.code


def cells(path, columns):
    """The images of a picture as (rows, columns, 8, 8, 3) integers.

    Each pixel of an image is drawn as 8 x 8, and the borders are 2 pixels of an image wide. The
    labels are on the left of them.
    """
    pixels = np.asarray(Image.open(path)).astype(int)[::8, -8 * (10 * columns + 2) :: 8]
    rows = range(2, pixels.shape[0] - 2, 10)
    return np.array(
        [[pixels[r : r + 8, c : c + 8] for c in range(2, 10 * columns, 10)] for r in rows]
    )


def shown(indices, kind=Photos):
    """Test images of the run, dequantised, as a picture shows them."""
    data = kind(batch_size=16, size=SIZE, n_train=N_TRAIN, n_test=N_TEST)
    data.setup()
    q = torch.stack([data.test[0, int(i)][0] for i in indices])
    x, _ = data.dequantizer(q, image_noise(torch.as_tensor(indices), q.shape[1:], 0))
    return (x * 256).floor().permute(0, 2, 3, 1).int().numpy()


def assert_labels(path, labels):
    """The rows of a picture have these labels on their left."""
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    expected = margin(labels, pixels.shape[1])
    assert torch.equal(pixels[:, :, : expected.shape[2]], expected)
    assert (pixels.shape[2] - expected.shape[2]) % 80 == 16, "columns of 80 and a border of 16"


CHOSEN = np.random.default_rng(0).permutation(N_TEST)  # seed=0


@torch.no_grad()
def test_the_ends_of_an_interpolation_are_the_images():
    flow = trained(CASE)
    x = CASE.data(2)
    eps, _ = flow(x)
    between = interpolate(tuple(z[0] for z in eps), tuple(z[1] for z in eps), 5)
    assert [z.shape for z in between] == [(5, *shape) for shape in flow.latent_shapes()]
    drawn, _ = flow.inverse(between)
    torch.testing.assert_close(drawn[[0, -1]], x, atol=1e-4, rtol=0)
    for z, ends in zip(between, eps, strict=True):
        torch.testing.assert_close(z[1], 0.75 * ends[0] + 0.25 * ends[1])


def test_an_attribute_is_a_difference_of_means_and_is_followed_level_by_level():
    eps = (
        torch.tensor([[1.0], [3.0], [7.0]]),
        torch.tensor([[[0.0, 2.0]], [[0.0, 4.0]], [[6.0, 6.0]]]),
    )
    direction = attribute_direction(eps, torch.tensor([4, 4, 0]), 4)
    assert direction[0].tolist() == [-5.0]
    assert direction[1].tolist() == [[-6.0, -3.0]]
    moved = move(
        (torch.tensor([1.0]), torch.tensor([[1.0, 1.0]])), direction, torch.tensor([-1.0, 0.0, 2.0])
    )
    assert moved[0].tolist() == [[6.0], [1.0], [-9.0]]
    assert moved[1].tolist() == [[[7.0, 4.0]], [[1.0, 1.0]], [[-11.0, -5.0]]]
    assert pictures.STRENGTHS.tolist() == pytest.approx([-1.6, -0.8, 0.0, 0.8, 1.6])
    for labels in ([1, 1, 1], [0, 2, 0]):
        with pytest.raises(
            ValueError, match="of 3 training images are of class 1, or none is: give more n_images"
        ):
            attribute_direction(eps, torch.tensor(labels), 1)


@torch.no_grad()
def test_levels_are_kept_from_the_coarsest_on():
    flow = trained(CASE)
    x = CASE.data(2)
    eps, _ = flow(x)
    assert eps[-1][0].shape[-1] < eps[0][0].shape[-1], "the last is not the coarsest"
    torch.testing.assert_close(flow.inverse(keep_levels(eps, 3))[0], x, atol=1e-4, rtol=0)
    by_hand = (torch.zeros_like(eps[0]), torch.zeros_like(eps[1]), eps[2])
    assert torch.equal(flow.inverse(keep_levels(eps, 1))[0], flow.inverse(by_hand)[0])
    others = tuple(torch.full_like(z, 5.0) for z in eps)
    kept = keep_levels(eps, 2, others)
    assert [kept[0] is others[0], kept[1] is eps[1], kept[2] is eps[2]] == [True] * 3


def test_a_run_is_drawn_and_twice_the_same(finished, tmp_path, capsys):
    draw(finished, "device=cpu")
    lines = capsys.readouterr().out.splitlines()
    names = ["attributes.png", "interpolation.png", "levels.png", "temperature.png"]
    assert sorted(path.name for path in (finished / "pictures").iterdir()) == names
    assert lines[0].startswith(
        f"{finished / 'pictures' / 'temperature.png'}: finite of 8 samples: 100% at T=0, "
    )
    assert lines[-1].startswith(f"{finished / 'pictures' / 'attributes.png'}: ")
    draw(finished, f"out={tmp_path}", "seed=0", "device=cpu")
    assert all(
        (tmp_path / name).read_bytes() == (finished / "pictures" / name).read_bytes()
        for name in names
    )
    draw(finished, f"out={tmp_path}", "seed=1")
    assert all(
        (tmp_path / name).read_bytes() != (finished / "pictures" / name).read_bytes()
        for name in names
    )


def test_data_without_labels_have_no_attributes(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Photos, "class_names", None)
    draw(finished, f"out={tmp_path}", "n=2")
    assert capsys.readouterr().out.splitlines()[-1] == "Photos has no labels: no attributes.png"
    assert not (tmp_path / "attributes.png").exists()


def test_what_the_pictures_show(finished, tmp_path):
    draw(finished, f"out={tmp_path}", "n=3")
    grid = cells(tmp_path / "temperature.png", 3)
    temperatures = [0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1]  # at 0 all samples are the same
    assert_labels(tmp_path / "temperature.png", [f"T={value}" for value in temperatures])
    assert (grid[-1] != grid[-1, :1]).any()
    with torch.no_grad():
        samples = load(finished).flow.sample(3, 0.7, generator=torch.Generator().manual_seed(0))
    samples = (samples * 256).floor().clamp(0, 255).permute(0, 2, 3, 1).int().numpy()
    assert np.abs(grid[temperatures.index(0.7)] - samples).max() <= 1

    pairs = cells(tmp_path / "interpolation.png", 3)
    ends = shown(CHOSEN[: 2 * pictures.N_PAIRS])
    assert np.abs(pairs[:, 0] - ends[::2]).max() <= 1
    assert np.abs(pairs[:, -1] - ends[1::2]).max() <= 1

    ends = CHOSEN[: 2 * pictures.N_PAIRS].reshape(-1, 2).tolist()
    assert_labels(tmp_path / "interpolation.png", [f"image {a} to {b}" for a, b in ends])

    image, coarsest, everything, redrawn = cells(tmp_path / "levels.png", 3)
    assert (image == shown(CHOSEN[:3])).all()
    assert np.abs(everything - image).max() <= 1
    assert np.abs(coarsest - image).mean() > 3
    assert np.abs(redrawn - coarsest).mean() > 3
    assert_labels(
        tmp_path / "levels.png", ["image", "1 of 2 levels", "2 of 2 levels", "1 of 2, rest T=0.7"]
    )


@pytest.mark.parametrize("kind", ["labelled", "conditional"])
def test_attributes_of_data_with_labels(kind, finished, tmp_path, capsys, request):
    """The last class has the bright images: its direction brightens, that of the first darkens."""
    request.getfixturevalue(kind)
    draw(finished, f"out={tmp_path}")
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line == f"{tmp_path / 'attributes.png'}: bee to ape, cat to bee, ape to cat"
    assert_labels(tmp_path / "attributes.png", ["bee to ape", "cat to bee", "ape to cat"])
    grid = cells(tmp_path / "attributes.png", 5)
    starts = [next(i for i in CHOSEN if i % 3 == label) for label in (1, 2, 0)]
    assert np.abs(grid[:, 2] - shown(starts, Labelled)).max() <= 1
    if kind == "labelled":
        assert grid[0, -1].mean() < grid[0, 2].mean() < grid[0, 0].mean()
        assert grid[2, 0].mean() < grid[2, 2].mean() < grid[2, -1].mean()
    pairs = cells(tmp_path / "interpolation.png", 8)
    ends = shown(CHOSEN[: 2 * pictures.N_PAIRS], Labelled)
    assert np.abs(pairs[:, 0] - ends[::2]).max() <= 1
    assert np.abs(pairs[:, -1] - ends[1::2]).max() <= 1

    draw(finished, f"out={tmp_path}", "attribute=cat", "n=2")
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith(f"{tmp_path / 'attributes-cat.png'}: ")
    )
    others = [i for i in CHOSEN if i % 3 != 2][:2]
    assert (
        np.abs(cells(tmp_path / "attributes-cat.png", 5)[:, 2] - shown(others, Labelled)).max() <= 1
    )


def test_columns_of_a_conditional_flow_are_its_classes(finished, tmp_path, conditional):
    draw(finished, f"out={tmp_path}")
    grid = cells(tmp_path / "temperature.png", len(NAMES))
    assert_labels(tmp_path / "temperature.png", [f"T={t:g}" for t in pictures.TEMPERATURES])
    assert (grid[0, 0] != grid[0, 1]).any()  # T = 0: the class alone makes the difference


def test_an_unknown_class_is_one_line_and_nothing_is_written(finished, tmp_path, capsys, labelled):
    line = mistake(capsys, finished, "attribute=catt", f"out={tmp_path / 'new'}")
    assert line == "error: attribute=catt is not known (did you mean cat?): give ape, bee, cat"
    assert not (tmp_path / "new").exists()


def test_too_few_training_images_are_one_line(finished, tmp_path, capsys, labelled):
    assert "give more n_images" in mistake(capsys, finished, "n_images=2", f"out={tmp_path}")


def test_missing_data_are_said_after_the_samples(finished, tmp_path, capsys, monkeypatch):
    class Missing(Photos):
        def __init__(self, root="data", download=True, **arguments):
            super().__init__(**arguments)
            self.root = root
            self.download = download

        def prepare_data(self):
            raise FileNotFoundError(f"not in data.root={self.root}, download={self.download}")

    monkeypatch.setitem(DATA, "photos", Missing)
    assert (
        mistake(capsys, finished, f"out={tmp_path}")
        == "error: not in data.root=data, download=False"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["temperature.png"]
    line = mistake(
        capsys, finished, f"out={tmp_path}", "data.root=/else where", "data.download=true"
    )
    assert line == "error: not in data.root=/else where, download=True"


def test_data_without_a_folder_take_none(finished, tmp_path, capsys):
    line = mistake(capsys, finished, f"out={tmp_path / 'new'}", "data.root=data")
    assert line == f"error: data.root is no key of photos, the data of {finished}: leave it out"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("nimages=3", "did you mean n_images?"),
        ("sed=3", "did you mean seed?"),
        ("n=abc", "n=abc has the wrong type"),
        ("n=1", "at least 2"),
        ("seed=-1", "at least 0"),
        ("device=gpu", "device=gpu is not here: give"),
        ("cat", "'cat' is not of the form key=value"),
        ("n_images=1", "at least 2"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(word, message, finished, tmp_path, capsys):
    assert message in mistake(capsys, finished, f"out={tmp_path / 'new'}", word)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["0", "2026", "true", "null", "1e5"])
def test_names_and_folders_stay_texts(text, tmp_path):
    """A class or a folder may have a name of digits."""
    words = [f"{key}={text}" for key in ("attribute", "out", "data.root")]
    _, options = pictures.read_options([str(tmp_path), *words])
    assert [options.attribute, options.out, options.data.root] == [text] * 3


def test_folders_without_pictures_are_one_line(tmp_path, capsys):
    assert "MODEL is missing: give MODEL" in mistake(capsys)
    assert "nowhere: give the folder of a run" in mistake(capsys, tmp_path / "nowhere")
    assert "holds no checkpoint" in mistake(capsys, tmp_path)
    small = [
        "flow.hidden_channels=4",
        "flow.n_couplings=2",
        "data.n_train=256",
        "data.n_val=8",
        "data.n_test=8",
    ]
    small += [
        "trainer.max_steps=1",
        "samples.n=8",
        "logger.name=none",
        f"run_dir={tmp_path / 'moons'}",
    ]
    realnvp_moons.main(small)
    assert "is of a flow of points" in mistake(capsys, tmp_path / "moons")
    assert not (tmp_path / "moons" / "pictures").exists()


def test_help_says_what_there_is(capsys):
    draw("--help")
    text = capsys.readouterr().out
    keys = [*pictures.DEFAULTS, *(f"data.{key}" for key in pictures.DEFAULTS["data"])]
    assert all(f"{key}=" in text for key in keys if key != "data")
