"""Image quality of samples: the extractor's weights, distances of distributions, the callback."""

import pickle
from collections.abc import Callable
from http.client import BadStatusLine
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_density import RandomImages, density, make_trainer
from test_distributed import on_two_ranks
from torch import Tensor, nn
from torch.utils.data import Dataset

from datamodules import make_data
from lightning_modules.callbacks.sample_quality import SampleQuality, batch_seed, in_colour
from lightning_modules.callbacks.samples import as_levels, evaluating
from lightning_modules.density import DensityModule
from lightning_modules.quality import extractors
from lightning_modules.quality.distributions import (
    METRICS,
    Comparison,
    compare_distributions,
    frechet_distance,
)
from lightning_modules.quality.extractors import (
    Extractor,
    Features,
    Inception,
    WeightsMissing,
    inception_architecture,
    read_weights,
)
from lightning_modules.stopping import AgreedError


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_weights_are_read_with_their_hash(tmp_path: Path, name: str) -> None:
    import hashlib

    expected = small_network().state_dict()
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save(expected, path)
    else:
        save_file(expected, path)
    weights, sha256 = read_weights(path, expected)
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_counters_of_batch_norms_may_be_absent(tmp_path: Path) -> None:
    expected = small_network().state_dict()
    path = tmp_path / "weights.pth"
    torch.save({k: v for k, v in expected.items() if "num_batches" not in k}, path)
    weights, _ = read_weights(path, expected)
    assert weights["1.num_batches_tracked"].item() == 0


class Opener:
    """Unpickling this object would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def other_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    weight = state["0.weight"]
    others = {k: v for k, v in state.items() if k != "0.bias"}
    return {**others, "0.weight": weight[:2], "2.bias": weight, "1.bias": state["1.bias"] / 0}


def test_unusable_files_are_refused_in_one_line(tmp_path: Path) -> None:
    expected = small_network().state_dict()
    path = tmp_path / "w.pth"

    def line(content: object = None) -> str:
        if content is not None:
            torch.save(content, path)
        with pytest.raises(ValueError, match=str(tmp_path)) as caught:
            read_weights(path, expected)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is no file" in line()
    text = line(other_weights(expected))
    assert "lacks 0.bias, has the unknown 2.bias" in text
    assert "0.weight of shape (2, 3, 3, 3), not (4, 3, 3, 3), and 1 more" in text
    assert "1.bias that are not finite" in line({**expected, "1.bias": expected["1.bias"] / 0})
    assert "map names to tensors" in line([torch.zeros(1)])
    path.write_bytes(path.read_bytes()[:50])
    assert "damaged" in line()
    path.write_bytes(pickle.dumps(Opener(tmp_path / "made")))
    assert "more in it" in line()
    torch.save({"a": Opener(tmp_path / "made")}, path)
    assert "more in it" in line()
    assert not (tmp_path / "made").exists()
    broken = tmp_path / "w.safetensors"
    broken.write_bytes(b"1234")
    with pytest.raises(ValueError, match="no readable safetensors"):
        read_weights(broken, expected)


def no_network(*arguments: object, **options: object) -> None:
    raise OSError(101, "Network is unreachable")


def no_server(*arguments: object, **options: object) -> None:
    raise BadStatusLine("a page to log in")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(no_network, "Network is unreachable"), (no_server, "a page to log in")],
)
def test_weights_that_cannot_be_had_are_a_reason(
    answer: Callable, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(extractors.urllib.request, "urlopen", answer)
    with pytest.raises(WeightsMissing, match=f"^https://.*could not be downloaded: .*{reason}$"):
        Inception()
    assert not list(tmp_path.rglob("*.part"))


def test_the_architecture_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    network = inception_architecture("2048")
    assert torch.equal(torch.get_rng_state(), state)
    assert network.state_dict()["fc.weight"].shape == (1008, 2048)
    assert not network.training


# ---------------------------------------------------------------------- distances


def gaussian(mean: list[float], scale: list[float], n: int = 4000, seed: int = 0) -> Tensor:
    """n points whose sample mean and covariance are exactly these, (n, 2)."""
    points = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    points = points - points.mean(0)
    white = points @ torch.linalg.inv(torch.linalg.cholesky(points.T.cov(), upper=True))
    return white * torch.tensor(scale) + torch.tensor(mean)


def test_fid_of_gaussians_is_the_closed_form() -> None:
    """|m1 - m2|^2 + sum (s1 - s2)^2 for diagonal covariances: 9 + 16 + 1 + 4."""
    first = gaussian([0.0, 0.0], [1.0, 3.0])
    second = gaussian([3.0, 4.0], [2.0, 1.0], seed=1)
    assert frechet_distance(first, second) == pytest.approx(30.0, rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-9)


def test_fid_of_covariances_that_do_not_commute() -> None:
    """tr (C1 C2)^(1/2) by scipy's square root of a matrix, which torch-fidelity does not use."""
    from scipy.linalg import sqrtm

    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=torch.float64)
    first = gaussian([0.0, 0.0], [1.0, 3.0])
    second = gaussian([0.0, 0.0], [2.0, 0.5], seed=1) @ turn
    covariances = [part.T.cov().numpy() for part in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = sum(c.trace() for c in covariances) - 2 * root.trace()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_kid_subsets_are_never_larger_than_a_set() -> None:
    points = gaussian([0.0, 0.0], [1.0, 1.0], n=50)
    others = gaussian([1.0, 0.0], [1.0, 1.0], n=20, seed=1)
    comparison = compare_distributions(points, others)
    assert comparison.facts["kid"]["subset_size"] == 20
    # With subsets of a whole set there is one: the unbiased estimate, written out (degree 3).
    kernel = {
        pair: (a @ b.T / 2 + 1) ** 3
        for pair, (a, b) in {
            "xx": (others, others),
            "xy": (others, others + 1),
            "yy": (others + 1, others + 1),
        }.items()
    }
    m = len(others)
    expected = sum(
        (kernel[key].sum() - kernel[key].diagonal().sum()) / (m * (m - 1)) for key in ("xx", "yy")
    )
    expected -= 2 * kernel["xy"].mean()
    whole = compare_distributions(others, others + 1)
    assert whole.figures["kid"] == pytest.approx(expected.item(), rel=1e-9)


def test_precision_and_recall_by_hand() -> None:
    """All samples are near images, and reach one of the two groups of images."""
    group = torch.arange(5, dtype=torch.float64)[:, None].repeat(1, 2)
    images = torch.cat([group, group + 1000])
    comparison = compare_distributions(group + 0.1, images)
    assert comparison.figures["precision"] == 1.0
    assert comparison.figures["recall"] == 0.5
    facts = {"neighbours": 3, "n": 5, "reference_n": 10}
    assert comparison.facts["recall"] == facts
    assert "inception_score" not in comparison.figures


def test_inception_score_of_sure_and_balanced_classes_is_their_number() -> None:
    logits = 1000.0 * torch.eye(4, dtype=torch.float64).repeat(100, 1)
    features = gaussian([0.0, 0.0], [1.0, 1.0], n=400)
    score = compare_distributions(features, features, logits).figures["inception_score"]
    assert score == pytest.approx(4.0, rel=0.04)  # of ten parts that are balanced by chance


def test_one_image_is_no_distribution() -> None:
    with pytest.raises(ValueError, match="1 samples beside 2 images: give at least 2"):
        compare_distributions(torch.zeros(1, 2), torch.zeros(2, 2))


# ---------------------------------------------------------------------- the callback


class MeanColour:
    """An extractor for tests: the mean of each channel, and its mean square."""

    name = "mean-colour"
    layer = "6"
    resize = "none"
    sha256 = "0" * 64
    is_published = False
    calls = 0

    def __call__(self, images: Tensor) -> Features:
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        MeanColour.calls += len(images)
        values = images.double() / 255
        layer = torch.cat([values.mean((2, 3)), values.square().mean((2, 3))], 1)
        return Features(layer.float().double(), layer.float().double()[:, :2])


def quality(tmp_path: Path, n: int = 0, **options: Any) -> SampleQuality:
    options = {"batch_size": 8, "cache": tmp_path / "cache", **options}
    return SampleQuality(n, make_extractor=lambda path: MeanColour(), **options)


def measured(callback: SampleQuality, module: DensityModule | None = None) -> dict[str, float]:
    """What a test of an untrained flow on random images logs."""
    trainer = make_trainer(callback)
    trainer.test(module or density(), datamodule=RandomImages(), verbose=False)
    return {key: value.item() for key, value in trainer.callback_metrics.items()}


def test_a_test_logs_every_figure_with_its_protocol(tmp_path: Path) -> None:
    callback = quality(tmp_path, n=20)
    module = density()
    torch.manual_seed(0)
    measured(quality(tmp_path), module)  # loaders draw from the global generator, too
    state = torch.get_rng_state()
    torch.manual_seed(0)
    figures = measured(callback, module)
    assert torch.equal(torch.get_rng_state(), state)
    keys = {f"test/{name}" for name in METRICS}
    assert keys <= figures.keys()
    assert callback.protocol.keys() == keys
    assert callback.not_measured == {}
    data = RandomImages()
    data.setup("test")
    protocol = callback.protocol["test/fid"]
    assert protocol["n"] == 20
    assert protocol["reference_n"] == data.n_train
    assert (protocol["temperature"], protocol["reference"]) == (1.0, "train")
    assert protocol["weights_sha256"] == "0" * 64
    assert protocol["published_weights"] is False
    assert callback.protocol["test/kid"]["subset_size"] == 20
    # The same figure from samples and images that are put together by hand.
    with evaluating(module), torch.no_grad():
        samples = [module.draw(8, 1.0, batch_seed(0, k)) for k in range(3)]
    levels = as_levels(torch.cat(samples)[:20], module.n_bits)
    images = torch.stack([data.unaugmented("train")[(0, i)][0] for i in range(data.n_train)])
    by_hand = frechet_distance(
        MeanColour()(in_colour(levels)).layer, MeanColour()(in_colour(images)).layer
    )
    assert figures["test/fid"] == pytest.approx(by_hand, rel=1e-5)
    assert not [key for key in module.state_dict() if "extractor" in key]


def test_images_are_computed_once_and_a_damaged_file_again(tmp_path: Path) -> None:
    def images_computed() -> int:
        MeanColour.calls = 0
        figures.append(measured(quality(tmp_path, n=8))["test/fid"])
        return MeanColour.calls - 8

    figures: list[float] = []
    first = images_computed()
    assert first > 0
    assert images_computed() == 0
    [file] = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    assert images_computed() == first
    assert figures[0] == figures[1] == figures[2]


class Broken(DensityModule):
    """Draws one sample that is not finite among all."""

    def draw(self, *arguments: Any, **options: Any) -> Tensor | None:
        samples = super().draw(*arguments, **options)
        assert samples is not None
        samples[0, 0, 0, 0] = torch.inf
        return samples


def test_samples_that_are_not_finite_have_a_reason_and_no_figure(tmp_path: Path) -> None:
    module = density()
    module.__class__ = Broken
    callback = quality(tmp_path, n=20, temperature=0.9)
    figures = measured(callback, module)
    assert not [key for key in figures if key.endswith(METRICS)]
    assert "test/bpd" in figures
    assert callback.not_measured.keys() == {f"test/{name}" for name in METRICS}
    reason = callback.not_measured["test/fid"]
    assert reason.startswith("since 15.00% of 20 samples at T=0.9 are not finite")
    assert callback.protocol == {}


def missing(path: object) -> Extractor:
    raise WeightsMissing("no network")


def test_without_weights_training_goes_on_and_one_line_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    callback = SampleQuality(50, every_n_steps=1, make_extractor=missing)
    trainer = make_trainer(callback, max_steps=4, val_check_interval=1, limit_val_batches=1)
    caplog.set_level("INFO")
    trainer.fit(density(), datamodule=RandomImages())
    trainer.test(density(), datamodule=RandomImages(), verbose=False)
    said = [line for line in caplog.messages if "not measured" in line]
    assert said == [
        "FID and the other figures of samples: not measured, since the network's weights are "
        "missing (no network): give metrics.inception_weights=FILE"
    ]
    assert callback.not_measured.keys() == {f"test/{name}" for name in METRICS}


def test_few_samples_are_measured_in_training_under_another_name(tmp_path: Path) -> None:
    callback = quality(tmp_path, small_n=1000, every_n_steps=2, batch_size=500)
    trainer = make_trainer(callback, max_steps=3, val_check_interval=1, limit_val_batches=1)
    trainer.fit(density(), datamodule=RandomImages())
    assert callback.measured_at == 2
    assert {"val/fid_1k", "val/kid_1k"} <= trainer.callback_metrics.keys()
    assert callback.protocol["val/fid_1k"]["n"] == 1000
    assert callback.state_dict() == {"measured_at": 2}
    again = quality(tmp_path, small_n=1000, every_n_steps=2)
    again.load_state_dict(callback.state_dict())  # a resumed run keeps the distance
    assert again.measured_at == 2


def _on_ranks(rank: int, folder: Path, ranks: int) -> dict[str, float]:
    callback = quality(folder, n=20, cache=folder / f"cache{rank}")
    trainer = make_trainer(callback, devices=ranks, num_nodes=1)
    trainer.test(density(), datamodule=RandomImages(), verbose=False)
    return {key: value.item() for key, value in trainer.callback_metrics.items()}


def test_two_ranks_give_the_figures_of_one(tmp_path: Path) -> None:
    alone = _on_ranks(0, tmp_path / "one", 1)
    first, second = on_two_ranks(tmp_path, _on_ranks, tmp_path, 2)
    for name in METRICS:
        assert first[f"test/{name}"] == second[f"test/{name}"] == alone[f"test/{name}"]


class Failing(MeanColour):
    """An extractor for which there is no memory."""

    def __call__(self, images: Tensor) -> Features:
        raise RuntimeError("CUDA error: out of memory")


@pytest.mark.parametrize("at", ["samples", "comparison", "images"])
def test_an_error_in_a_measurement_costs_no_other_figure(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training of days would be lost with its test."""
    callback = quality(tmp_path, n=20)
    if at == "samples":
        callback.make_extractor = lambda path: Failing()
        expected = "since samples cannot be drawn: CUDA error: out of memory"
    elif at == "comparison":
        name = "lightning_modules.callbacks.sample_quality.compare_distributions"
        monkeypatch.setattr(name, lambda *parts: int("x" * bool(parts)))
        expected = "since samples cannot be compared: invalid literal"
    else:
        monkeypatch.setattr(RandomImages, "unaugmented", lambda *_: [])
        expected = "since there are 0 train images: give another quality.reference"
    figures = measured(callback)
    assert "test/bpd" in figures
    assert callback.protocol == {}
    assert callback.not_measured.keys() == {f"test/{name}" for name in METRICS}
    assert callback.not_measured["test/fid"].startswith(expected)


def _failing_on_one(rank: int, folder: Path) -> tuple[set[str], str]:
    kind = [MeanColour, Failing][rank]
    callback = quality(folder, n=20)
    callback.make_extractor = lambda path: kind()
    trainer = make_trainer(callback, devices=2, num_nodes=1)
    trainer.test(density(), datamodule=RandomImages(), verbose=False)
    return set(trainer.callback_metrics), callback.not_measured["test/fid"]


def test_no_rank_waits_for_one_that_fails(tmp_path: Path) -> None:
    for figures, why in on_two_ranks(tmp_path, _failing_on_one, tmp_path):
        assert "test/bpd" in figures
        assert why == "since samples cannot be drawn: CUDA error: out of memory"


def test_a_figure_that_is_no_number_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "lightning_modules.callbacks.sample_quality.compare_distributions"
    comparison = Comparison({"fid": float("nan"), "kid": 0.5}, {"fid": {}, "kid": {}})
    monkeypatch.setattr(name, lambda *_: comparison)
    callback = quality(tmp_path, n=20)
    figures = measured(callback)
    assert figures["test/kid"] == 0.5
    assert "test/fid" not in figures.keys() | callback.protocol.keys()
    assert callback.not_measured["test/fid"] == "since it is nan, no number"


def test_a_users_wrong_weights_end_the_run_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(small_network().state_dict(), path)
    callback = SampleQuality(4, weights=path)
    with pytest.raises(AgreedError, match="holds the weights of another network: it lacks"):
        measured(callback)


# ---------------------------------------------------------------------- beside torch-fidelity


def random_inception(path: Path) -> Path:
    """A file of random weights of the network, of a size at which activations neither die nor grow.

    They have the right names and shapes, so the figures mean nothing and every step is real.
    """
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in inception_architecture("2048").state_dict().items():
        state[key] = torch.zeros(value.shape, dtype=value.dtype)
        if value.ndim > 1:
            scale = (2 / value[0].numel()) ** 0.5
            state[key] = scale * torch.randn(value.shape, generator=generator)
        elif key.endswith(("running_var", "bn.weight")):
            state[key] = torch.ones(value.shape)
    torch.save(state, path)
    return path


class Listed(Dataset):
    """Images as torch-fidelity takes them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i]


def real_images(n: int) -> Tensor:
    """n images of CIFAR-10's test split; crops of the embedded photographs where it is missing."""
    folder = Path(__file__).parents[1] / "data"
    arguments: dict[str, Any] = {"name": "photos", "n_test": n}
    if (folder / "cifar-10-batches-py").is_dir():
        arguments = {"name": "cifar10", "root": folder, "download": False}
    data = make_data(seed=0, batch_size=8, **arguments)
    data.prepare_data()
    data.setup()
    return torch.stack([data.test[(0, i)][0] for i in range(n)])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_figures_are_torch_fidelitys_own(tmp_path: Path) -> None:
    from torch_fidelity import calculate_metrics

    path = random_inception(tmp_path / "weights.pth")
    images = real_images(512)
    extractor = Inception(path, "64")
    parts = [extractor(images[:256]).layer, extractor(images[256:]).layer]
    ours = compare_distributions(*parts)
    theirs = calculate_metrics(
        input1=Listed(images[:256]),
        input2=Listed(images[256:]),
        fid=True,
        kid=True,
        prc=True,
        feature_layer_fid="64",
        feature_layer_kid="64",
        feature_layer_prc="64",
        kid_subset_size=256,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(path),
        cuda=False,
        cache=False,
        verbose=False,
        batch_size=64,
    )
    assert ours.figures["fid"] > 0
    assert ours.figures["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    kid = theirs["kernel_inception_distance_mean"]
    assert ours.figures["kid"] == pytest.approx(kid, rel=1e-2, abs=1e-6)
    for name in ("precision", "recall"):
        assert ours.figures[name] == pytest.approx(theirs[name], abs=0.01)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_papers_layer_runs_on_a_model(tmp_path: Path) -> None:
    path = random_inception(tmp_path / "weights.pth")
    callback = SampleQuality(64, weights=path, reference_n=64, cache=tmp_path, batch_size=32)
    figures = measured(callback)
    assert {f"test/{name}" for name in METRICS} <= figures.keys()
    facts = callback.protocol["test/kid"]
    assert (facts["layer"], facts["subset_size"]) == ("2048", 64)
    assert figures["test/fid"] > 0
    assert 1 <= figures["test/inception_score"] <= 1008


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_measures_the_same(tmp_path: Path) -> None:
    """Samples of a GPU may differ in the last bit of a few pixels, and so may figures a little."""
    path = random_inception(tmp_path / "weights.pth")
    module = density()
    figures = {}
    for accelerator in ("gpu", "cpu"):
        callback = SampleQuality(64, weights=path, reference_n=64, cache=tmp_path / accelerator)
        trainer = make_trainer(callback, accelerator=accelerator, devices=1)
        trainer.test(module, datamodule=RandomImages(), verbose=False)
        figures[accelerator] = {
            name: trainer.callback_metrics[f"test/{name}"].item() for name in METRICS
        }
    assert figures["gpu"] == pytest.approx(figures["cpu"], rel=1e-2, abs=0.02)


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 1}, r"quality\.n=1 is no distribution"),
        ({"small_n": 1500}, r"quality\.small_n=1500: give whole thousands"),
        ({"temperature": -1.0}, r"quality\.temperature=-1\.0"),
        ({"reference": "all"}, r"quality\.reference=all: give train, val, test"),
        ({"reference_n": 1}, r"quality\.reference_n=1"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleQuality(**options)
