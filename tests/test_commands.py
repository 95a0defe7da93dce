"""reproduce.sample, score and evaluate: files and figures, going on after a stop, mistakes."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_folders import make_split_folder
from PIL import Image
from test_glow_scripts import run

from lightning_modules.callbacks.samples import margin
from reproduce import evaluate, export, glow_photos, load, sample, score
from reproduce.config import ConfigError
from reproduce.model import TrainedModel
from reproduce.model_command import fingerprint, read_words

ROOT = Path(__file__).parents[1]
COMMANDS = {"sample": sample, "score": score, "evaluate": evaluate}
TINY_FOLDER_RUN = [
    *("logger.name=none", "trainer.accelerator=cpu", "trainer.max_steps=2", "samples.n=2"),
    *("trainer.precision=32-true", "trainer.val_check_interval=2", "checkpoint.every_n_steps=2"),
    *("samples.every_n_steps=2", "flow.n_levels=2", "flow.depth=1", "flow.hidden_channels=4"),
]
NAMES = ("astronaut", "cat", "coffee", "rocket", "motorcycle", "china", "flower")


@pytest.fixture(scope="module")
def realnvp(tmp_path_factory):
    """The folder of a finished run, of a flow with batch norms."""
    folder = tmp_path_factory.mktemp("runs") / "realnvp"
    run("realnvp_photos", folder, "eval.bn_images=32")
    return folder


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """The same with averaged weights, whose statistics are always estimated anew."""
    folder = tmp_path_factory.mktemp("runs") / "averaged"
    run("realnvp_photos", folder, "eval.bn_images=32", "ema.decay=0.5", "eval.noise_samples=2")
    return folder


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """The folder of a finished run of a class-conditional flow, on images of 5 bits."""
    folder = tmp_path_factory.mktemp("runs") / "conditional"
    run("glow_cifar10_conditional", folder, "ema.decay=0.5", "trainer.limit_test_batches=2")
    return folder


@pytest.fixture
def images(tmp_path):
    """A folder of images, with two files that are none."""
    folder = tmp_path / "images"
    random = np.random.default_rng(0)
    for name in ("a.png", "cat/b.png", "coffee/nested/c.png", "d, e.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / name)
    Image.new("RGB", (16, 24), (10, 100, 200)).save(folder / "flat.png")
    (folder / "bad.png").write_text("no image")
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("no image")
    return folder


def call(name, *words):
    COMMANDS[name].main([str(word) for word in words])


def mistake(name, *words):
    with pytest.raises(SystemExit) as stop:
        call(name, *words)
    assert isinstance(stop.value.code, str), "exit code 0 for a mistake"
    assert stop.value.code.startswith("error: ")
    assert "\n" not in stop.value.code
    return stop.value.code.removeprefix("error: ")


def interrupted(name, *words):
    """The line with which a command ends after Ctrl-C."""
    with pytest.raises(SystemExit) as stop:
        call(name, *words)
    assert isinstance(stop.value.code, str)
    return stop.value.code


def interrupt_after(monkeypatch, owner, name, n):
    """Let the n-th call of a function be interrupted, as by Ctrl-C."""
    function = getattr(owner, name)
    calls = []

    def interrupted_function(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == n:
            raise KeyboardInterrupt
        return function(*arguments, **keywords)

    monkeypatch.setattr(owner, name, interrupted_function)
    return calls


def pixels(path):
    """(C, H, W)"""
    array = np.asarray(Image.open(path))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---------------------------------------------------------------------- all commands


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_key(name, capsys):
    call(name, "--help")
    text = capsys.readouterr().out
    assert f"python -m reproduce.{name} " in text
    assert all(f"  {key}=" in text for key in COMMANDS[name].DEFAULTS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample"], "MODEL is missing: give MODEL, and see --help"),
        (["score", "glow"], "FOLDER is missing: give MODEL FOLDER, and see --help"),
        (["sample", "nowhere/at/all"], "no model nowhere/at/all"),
        (["sample", "RUN", "n=0"], "n=0 is out of range: give at least 1"),
        (["sample", "RUN", "temperature=-1"], "temperature=-1.0 is out of range"),
        (["sample", "RUN", "temperature=warm"], "temperature=warm has the wrong type"),
        (["sample", "RUN", "tempratur=1"], "did you mean temperature?"),
        (["sample", "RUN", "--n=3"], "did you mean n=3?"),
        (["sample", "RUN", "more"], "'more' is not of the form key=value"),
        (["sample", "RUN", "device=gpu"], "device=gpu is not here: give"),
        (["sample", "RUN", "label=cat"], "label=cat: this RealNVP has no classes"),
        (["score", "RUN", "RUN", "seed=-1"], "seed=-1 is out of range: give at least 0"),
        (["score", "RUN", "RUN", "noise_samples=0"], "noise_samples=0 is out of range"),
        (["score", "RUN", "nowhere"], "there is no folder nowhere"),
        (["score", "RUN", "RUN/checkpoints"], "contains no .png"),
        (["evaluate", "RUN", "noise_sample=2"], "did you mean noise_samples?"),
        (["evaluate", "RUN", "data.n_tst=5"], "did you mean data.n_test?"),
        (["evaluate", "RUN", "data.n_test=many"], "data.n_test=many has the wrong type"),
        (["evaluate", "RUN", "data.root=here"], "data.root is not a known key"),
        (["evaluate", "RUN", "data.name=mnist"], "a test is on the data of the run, photos"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    words, message, realnvp, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    name, *words = [word.replace("RUN", str(realnvp)) for word in words]
    assert message in mistake(name, *words)
    assert list(tmp_path.iterdir()) == []


def test_words_come_in_any_order_and_a_path_may_look_like_a_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("n=3").mkdir()
    names, options = read_words(["n=5", "n=3", "seed=1"], ["MODEL"], {"n": 1, "seed": 0})
    assert names == ["n=3"]
    assert options == {"n": 5, "seed": 1}
    with pytest.raises(ConfigError, match="n is given twice"):
        read_words(["model", "n=4", "n=5"], ["MODEL"], {"n": 1})


def test_a_fingerprint_is_of_names_and_values():
    weights = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor(3)}
    same = {"b": torch.tensor(3), "a": weights["a"].T.contiguous().T}
    assert fingerprint(same) == fingerprint(weights)
    others = [
        {"a": weights["a"].T, "b": weights["b"]},
        {"a": weights["a"].flatten(), "b": weights["b"]},
        {"a": weights["a"], "c": weights["b"]},
    ]
    assert len({fingerprint(other) for other in [weights, *others]}) == 4


def test_a_command_runs_by_its_path_from_another_folder(realnvp, images, tmp_path):
    words = [ROOT / "reproduce" / "score.py", realnvp, images.name]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=images.parent,
        capture_output=True,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("scores.csv: 5 images, mean ")
    assert done.stdout.endswith("; 2 unreadable files have an empty row\n")
    assert done.stderr.splitlines() == [
        "unreadable: images/bad.png is damaged at its beginning, or not one of PNG, JPEG, WebP, "
        "BMP and TIFF",
        "unreadable: images/empty.jpg is empty",
    ]
    assert (tmp_path / "scores.csv").is_file()


# ---------------------------------------------------------------------- sample


def test_samples_are_numbered_files_and_a_grid(realnvp, tmp_path, capsys):
    folder = tmp_path / "out"
    call("sample", realnvp, "n=11", "temperature=0.7", "seed=3", f"out={folder}", "batch_size=4")
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}: 11 samples, 100% of them finite",
        str(folder / "grid.png"),
    ]
    names = [f"{i:06d}.png" for i in range(11)]
    assert sorted(contents(folder)) == [*names, "grid.png", "samples.json"]
    samples = load(realnvp).sample(11, 0.7, seed=3, batch_size=4).numpy()
    drawn = np.stack([pixels(folder / name) for name in names])
    assert np.array_equal(drawn, samples)
    assert len(np.unique(drawn.reshape(11, -1), axis=0)) == 11
    grid = pixels(folder / "grid.png")
    height = 2 * 80 + 16
    labels = margin(["T=0.7", ""], height).numpy()
    assert grid.shape == (3, height, 8 * 80 + 16 + labels.shape[2])
    assert np.array_equal(grid[:, :, : labels.shape[2]], labels)
    cells = grid[:, 16::8, labels.shape[2] + 16 :: 8]  # each pixel is drawn as 8 x 8
    assert np.array_equal(cells[:, :8, 10:18], samples[1])
    assert np.array_equal(cells[:, 10:18, 20:28], samples[10])
    assert (cells[:, 10:18, 30:38] == 255).all()  # there is no twelfth sample


def test_samples_go_on_after_an_interruption_and_for_a_larger_n(realnvp, tmp_path, monkeypatch):
    words = [realnvp, "batch_size=4", "seed=1"]
    call("sample", *words, "n=10", f"out={tmp_path / 'whole'}")
    whole = contents(tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, sample, "write_sample", 7)
        line = interrupted("sample", *words, "n=10", f"out={tmp_path / 'parts'}")
    assert line == "stopped: the same command keeps what is drawn, and goes on"
    parts = contents(tmp_path / "parts")
    assert len(parts) == 7
    assert parts.items() <= whole.items()
    drawn = interrupt_after(monkeypatch, TrainedModel, "draw", 100)
    call("sample", *words, "n=10", f"out={tmp_path / 'parts'}")
    assert contents(tmp_path / "parts") == whole
    assert len(drawn) == 2  # the second and third batch
    call("sample", *words, "n=10", f"out={tmp_path / 'parts'}")
    assert len(drawn) == 2
    for content in (b"", b"x", (tmp_path / "parts" / "000004.png").read_bytes()[:-30]):
        (tmp_path / "parts" / "000004.png").write_bytes(content)  # as after a full disk
        call("sample", *words, "n=10", f"out={tmp_path / 'parts'}")
        assert contents(tmp_path / "parts") == whole
    call("sample", *words, "n=14", f"out={tmp_path / 'parts'}")
    longer = contents(tmp_path / "parts")
    assert len(longer) == 14 + 2
    assert all(longer[name] == whole[name] for name in whole if name != "grid.png")


def test_a_folder_of_other_samples_or_files_is_refused(realnvp, averaged, tmp_path):
    folder = tmp_path / "samples"
    call("sample", realnvp, "n=2", f"out={folder}", "temperature=0.5")
    before = contents(folder)
    other = ["n=3", f"out={folder}"]
    assert (
        mistake("sample", realnvp, *other, "seed=2") == f"{folder} holds samples with seed=0 "
        "temperature=0.5: say the same, or give another out="
    )
    assert "samples of another model" in mistake("sample", averaged, *other, "temperature=0.5")
    (folder / "samples.json").write_text("{")
    assert "samples.json is damaged" in mistake("sample", realnvp, *other)
    (folder / "samples.json").unlink()
    assert "holds other files than samples" in mistake("sample", realnvp, *other)
    before.pop("samples.json")
    assert contents(folder) == before
    (tmp_path / "file").touch()


@pytest.mark.parametrize("name", ["sample", "score"])
def test_an_out_that_cannot_be_written_is_refused_before_anything_is_computed(
    name, realnvp, images, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    words = {"sample": [realnvp], "score": [realnvp, images]}[name]
    monkeypatch.setattr(TrainedModel, "to", None)
    line = mistake(name, *words, f"out={tmp_path / 'file' / 'in'}")
    assert "file/in" in line
    assert line.endswith(": give another out=")


def test_samples_that_are_not_finite_are_counted_also_where_they_are_kept(
    realnvp, tmp_path, capsys, monkeypatch
):
    draw = TrainedModel.draw

    def broken(*arguments, **keywords):
        samples = draw(*arguments, **keywords)
        samples[1, 0, 2, 3] = torch.nan
        return samples

    monkeypatch.setattr(TrainedModel, "draw", broken)
    line = (
        f"{tmp_path}: 4 samples, 75.0% of them finite (1 is not, with magenta pixels: "
        "give a lower temperature)"
    )
    for _ in range(2):
        call("sample", realnvp, "n=4", f"out={tmp_path}")
        assert capsys.readouterr().out.splitlines()[0] == line
    magenta = (pixels(tmp_path / "000001.png") == np.array([255, 0, 255])[:, None, None]).all(0)
    assert np.argwhere(magenta).tolist() == [[2, 3]]


def test_samples_of_classes(conditional, tmp_path):
    folder = tmp_path / "all"
    call("sample", conditional, "n=15", f"out={folder}")
    model = load(conditional)
    samples = model.sample(15).numpy()
    assert np.array_equal(pixels(folder / "000012.png"), samples[12])
    assert np.isin(samples, [*range(0, 256, 8), 255]).all()  # 5 bits
    grid = pixels(folder / "grid.png")
    labels = margin(NAMES, grid.shape[1]).numpy()
    assert np.array_equal(grid[:, :, : labels.shape[2]], labels)
    cells = grid[:, 16::8, labels.shape[2] + 16 :: 8]
    assert np.array_equal(cells[:, 50:58, 10:18], samples[5 + 7])  # the second of class 5

    call("sample", conditional, "n=3", f"out={tmp_path / 'cat'}", "label=cat")
    assert np.array_equal(pixels(tmp_path / "cat" / "000002.png"), model.sample(3, label="cat")[2])
    assert json.loads((tmp_path / "cat" / "samples.json").read_text())["label"] == "cat"
    grid = pixels(tmp_path / "cat" / "grid.png")
    labels = margin(["cat, T=1"], grid.shape[1]).numpy()
    assert np.array_equal(grid[:, :, : labels.shape[2]], labels)
    line = mistake("sample", conditional, f"out={tmp_path / 'new'}", "label=catt")
    assert "(did you mean cat?)" in line
    assert not (tmp_path / "new").exists()


def test_a_grey_sample_is_a_grey_file(tmp_path):
    values = torch.arange(16.0).view(1, 4, 4) / 16
    sample.write_sample(tmp_path / "a.png", values, 8)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "L"
    assert torch.equal(sample.pixels(tmp_path / "a.png"), (values * 256).to(torch.uint8))


# ---------------------------------------------------------------------- score


def rows_of(path):
    """File -> its row."""
    table = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    return {row.pop("file"): row for row in table}


def test_scores_are_bits_per_dim_of_the_model_and_of_png_files(realnvp, images, tmp_path, capsys):
    out = tmp_path / "new" / "scores.csv"
    call("score", realnvp, images, f"out={out}", "noise_samples=3", "batch_size=2", "seed=5")
    rows = rows_of(out)
    files = ["a.png", "bad.png", "cat/b.png", "coffee/nested/c.png"]
    assert list(rows) == [*files, "d, e.png", "empty.jpg", "flat.png"]
    assert set(rows["bad.png"].values()) == set(rows["empty.jpg"].values()) == {""}
    model = load(realnvp)
    means = []
    for name, row in rows.items():
        if not row["bits_per_dim"]:
            continue
        image = pixels(images / name)[:, :8, :8]  # flat.png is larger, and of one colour
        samples = [
            model.bits_per_dim(image[None], seed=5, keys=score.noise_keys([image], k)).item()
            for k in range(3)
        ]
        assert len(set(samples)) == 3
        stream = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(stream, "PNG", optimize=True)
        png = 8 * len(stream.getvalue()) / 192
        expected = [np.mean(samples), np.std(samples, ddof=1) / 3**0.5, png, np.mean(samples) - png]
        assert [float(cell) for cell in row.values()] == pytest.approx(expected, abs=2e-5)
        means.append(float(row["bits_per_dim"]))
    captured = capsys.readouterr()
    assert captured.out == (
        f"{out}: 5 images, mean {np.mean(means):.4f} bits/dim; "
        "2 unreadable files have an empty row\n"
    )
    assert "images/bad.png is damaged" in captured.err
    assert sorted(path.name for path in out.parent.iterdir()) == ["scores.csv"]


def test_other_files_do_not_move_a_score(realnvp, images, tmp_path):
    call("score", realnvp, images, f"out={tmp_path / 'all.csv'}")
    everything = rows_of(tmp_path / "all.csv")
    (tmp_path / "alone").mkdir()
    shutil.copy(images / "d, e.png", tmp_path / "alone" / "renamed.png")
    call("score", realnvp, tmp_path / "alone", f"out={tmp_path / 'alone.csv'}")
    assert rows_of(tmp_path / "alone.csv") == {"renamed.png": everything["d, e.png"]}
    assert everything["d, e.png"]["standard_error"] == ""
    call("score", realnvp, tmp_path / "alone", f"out={tmp_path / 'alone.csv'}", "seed=1")
    assert rows_of(tmp_path / "alone.csv") != {"renamed.png": everything["d, e.png"]}


def test_scores_go_on_after_an_interruption(realnvp, images, tmp_path, monkeypatch):
    words = [realnvp, images, "batch_size=1", "noise_samples=2"]
    call("score", *words, f"out={tmp_path / 'whole.csv'}")
    out = tmp_path / "parts.csv"
    with monkeypatch.context() as patch:
        interrupt_after(patch, score, "score", 3)
        line = interrupted("score", *words, f"out={out}")
    assert line == "stopped: the same command keeps what is scored, and goes on"
    assert not out.exists()
    with (tmp_path / "parts.csv.partial").open("a") as file:
        file.write('{"cut off": [1.0, ')
    scored = interrupt_after(monkeypatch, score, "score", 100)
    call("score", *words, f"out={out}")
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert len(scored) == 3  # of five images
    assert not (tmp_path / "parts.csv.partial").exists()


def test_scores_of_other_settings_are_not_taken(realnvp, images, tmp_path, monkeypatch):
    out = tmp_path / "scores.csv"
    with monkeypatch.context() as patch:
        interrupt_after(patch, score, "score", 3)
        interrupted("score", realnvp, images, "batch_size=1", f"out={out}")
    scored = interrupt_after(monkeypatch, score, "score", 100)
    call("score", realnvp, images, "batch_size=1", f"out={out}", "seed=1")
    assert len(scored) == 5


def test_images_of_classes_are_in_folders_or_have_a_label(conditional, images, tmp_path):
    out = tmp_path / "scores.csv"
    line = mistake("score", conditional, images, f"out={out}")
    assert f"{images / 'a.png'} lies in no folder of a class" in line
    assert list(tmp_path.iterdir()) == [images]
    model = load(conditional)
    for path in [*images.glob("*.*")]:
        path.unlink()
    call("score", conditional, images, f"out={out}")
    rows = rows_of(out)
    assert list(rows) == ["cat/b.png", "coffee/nested/c.png"]
    for name, label in (("cat/b.png", 1), ("coffee/nested/c.png", 2)):
        image = pixels(images / name)
        keys = score.noise_keys([image], 0)
        expected = model.bits_per_dim(image[None], [label], keys=keys).item()
        assert float(rows[name]["bits_per_dim"]) == pytest.approx(expected, abs=1e-5)
        assert float(rows[name]["png_bits_per_dim"]) == pytest.approx(
            score.png_bits_per_dim(image // 8 * 8, 8)
        )
    call("score", conditional, images, f"out={out}", "label=coffee")
    labelled = rows_of(out)
    assert labelled["coffee/nested/c.png"] == rows["coffee/nested/c.png"]
    assert labelled["cat/b.png"] != rows["cat/b.png"]


def test_a_class_has_its_name_also_in_the_form_of_a_mac(tmp_path):
    model = SimpleNamespace(class_names=("Hund", unicodedata.normalize("NFC", "Bär")))
    paths = [tmp_path / unicodedata.normalize(form, "Bär") / "a.png" for form in ("NFC", "NFD")]
    assert score.labels_of(model, "it", tmp_path, paths, "") == [1, 1]


def test_what_is_no_table_is_not_overwritten(realnvp, images, tmp_path):
    path = tmp_path / "notes.csv"
    path.write_text("file,bits\n")
    assert "is no table of scores" in mistake("score", realnvp, images, f"out={path}")
    assert path.read_text() == "file,bits\n"
    assert "is a folder" in mistake("score", realnvp, images, f"out={images}")


def test_a_folder_without_a_readable_image_has_no_table(realnvp, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.png").write_text("no image")
    line = mistake("score", realnvp, folder, f"out={tmp_path / 'scores.csv'}")
    assert line == "none of 12 files can be read: give a folder of images"
    assert list(tmp_path.iterdir()) == [folder]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[-1] == "2 more files are unreadable"


# ---------------------------------------------------------------------- evaluate


def result_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def copy_with(folder, target, **changes):
    """A copy of a run folder whose result has other figures: metric -> what is added."""
    shutil.copytree(folder, target)
    result = result_of(folder)
    for key, difference in changes.items():
        result["metrics"][f"test/{key}"] += difference
    (target / "result.json").write_text(json.dumps(result))
    return target


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("realnvp", ["bpd", "bpd_reestimated"]),
        ("averaged", ["bpd", "bpd_iw2"]),
        ("conditional", ["accuracy", "bpd"]),
    ],
)
def test_the_test_is_that_of_the_run_to_the_last_digit(name, metrics, request, capsys):
    folder = request.getfixturevalue(name)
    recorded = result_of(folder)["metrics"]
    model = load(folder)
    config, changed = evaluate.config_of(model, 0, {})
    evaluation = evaluate.evaluate(model, config, "cpu")
    assert changed == []
    assert sorted(evaluation.figures) == [f"test/{metric}" for metric in metrics]
    for key, value in evaluation.figures.items():
        assert value == recorded[key]
    anew = {"realnvp": {"test/bpd_reestimated"}, "averaged": {"test/bpd", "test/bpd_iw2"}}
    assert evaluation.reestimated == anew.get(name, set())
    call("evaluate", folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-len(metrics) :] == [
        f"{key}: {value:.9g}, recorded {value:.9g}: equal to the last digit"
        for key, value in sorted(evaluation.figures.items())
    ]


def test_more_noise_samples_give_a_bound_and_leave_the_first_figure(realnvp, capsys):
    call("evaluate", realnvp, "noise_samples=4")
    text = capsys.readouterr().out
    figures = result_of(realnvp)["metrics"]
    assert f"test/bpd: {figures['test/bpd']:.9g}, recorded" in text
    config, _ = evaluate.config_of(load(realnvp), 4, {})
    bound = evaluate.evaluate(load(realnvp), config, "cpu").figures["test/bpd_iw4"]
    assert figures["test/bpd"] - 0.1 < bound < figures["test/bpd"]


def test_a_setting_of_samples_without_samples_is_one_line(realnvp):
    for word in ("quality.temperature=0.7", "metrics.inception_weights=weights.pth"):
        with pytest.raises(SystemExit, match=r"no effect without samples: give quality\.n=N"):
            call("evaluate", realnvp, word)


def test_a_run_on_a_folder_is_tested_again_from_another_place(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = make_split_folder(tmp_path / "my photographs", n_train=20, n_val=2, n_test=3)
    folder = tmp_path / "run"
    words = ["data.name=folder", f"data.root={root}", "data.size=8", "data.batch_size=4"]
    own_cache = f"data.cache={tmp_path / 'own cache'}"
    glow_photos.main([*words, own_cache, *TINY_FOLDER_RUN, f"run_dir={folder}"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    capsys.readouterr()
    call("evaluate", folder)
    assert capsys.readouterr().out.splitlines()[-1].endswith("equal to the last digit")
    assert load(folder).stored.origin["config"]["data"]["root"] == str(root)
    hub = tmp_path / "hub"
    export.main([str(folder), f"out={hub}"])
    call("evaluate", hub, f"data.root={root}")
    assert capsys.readouterr().out.splitlines()[-1].endswith("equal to the last digit")
    assert list(elsewhere.iterdir()) == []  # the images are decoded into a cache of this user


def test_another_figure_of_the_same_test_is_exit_code_1(realnvp, tmp_path, capsys):
    close = copy_with(realnvp, tmp_path / "close", bpd=1e-5)
    call("evaluate", close)
    assert "-1e-05, within rounding" in capsys.readouterr().out
    far = copy_with(realnvp, tmp_path / "far", bpd_reestimated=-0.002)
    assert "these are not the recorded figures" in mistake("evaluate", far)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].endswith("equal to the last digit")
    assert lines[-1].startswith("test/bpd_reestimated: ")
    assert lines[-1].endswith("+0.002, more than rounding")


def test_a_figure_that_is_not_finite_is_recorded_as_null():
    evaluation = evaluate.Evaluation({"test/bpd": float("nan")}, frozenset(), None, {}, {})
    _, is_close = evaluate.difference("test/bpd", evaluation, None, 1e-4)
    assert is_close
    _, is_close = evaluate.difference("test/bpd", evaluation, 3.5, 1e-4)
    assert not is_close
    finite = evaluate.Evaluation({"test/bpd": 3.5}, frozenset(), None, {}, {})
    _, is_close = evaluate.difference("test/bpd", finite, None, 1e-4)
    assert not is_close


def test_statistics_that_are_estimated_on_another_kind_of_device_may_differ_by_their_noise():
    evaluation = evaluate.Evaluation(
        {"test/bpd": 3.5, "test/bpd_reestimated": 3.502},
        frozenset({"test/bpd_reestimated"}),
        None,
        {},
        {},
    )
    recorded = {"metrics": {"test/bpd": 3.5, "test/bpd_reestimated": 3.5}, "device": "1 x H200"}
    _, is_close = evaluate.compare(evaluation, recorded, "cpu")
    assert is_close
    _, is_close = evaluate.compare(evaluation, recorded, "cuda")
    assert not is_close
    recorded["metrics"]["test/bpd"] = 3.502
    _, is_close = evaluate.compare(evaluation, recorded, "cpu")
    assert not is_close


def test_a_test_with_other_settings_is_not_compared(realnvp, tmp_path, capsys):
    far = copy_with(realnvp, tmp_path / "far", bpd=1)
    call("evaluate", far, "data.n_test=17", "data.num_workers=0")
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == "not compared with the recorded figures: data.n_test=17 in this test"
    assert "not the recorded figures" in mistake("evaluate", far, "data.n_test=40")


def test_micro_batches_change_no_figure_but_where_a_number_of_batches_is_tested(
    realnvp, conditional, capsys
):
    call("evaluate", realnvp, "data.micro_batch=5")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("test/bpd: ")
    assert lines[-2].endswith(("equal to the last digit", "within rounding"))
    _, changed = evaluate.config_of(load(conditional), 0, {"data.micro_batch": "5"})
    assert changed == ["data.micro_batch=5"]


def test_a_test_on_other_images_is_not_compared():
    evaluation = evaluate.Evaluation({}, frozenset(), "abc", {}, {})
    assert evaluate.other_images(evaluation, {"data": {"sha256": "abd"}}) == ["other images"]
    assert evaluate.other_images(evaluation, {"data": {"sha256": "abc"}}) == []
    assert evaluate.other_images(evaluation, {}) == []


def test_data_of_other_classes_are_refused(conditional):
    model = load(conditional)
    evaluate.check_classes(model, NAMES)
    with pytest.raises(ConfigError, match="the classes of the data are cat, dog, and those"):
        evaluate.check_classes(model, ("cat", "dog"))


def test_weights_that_were_not_tested_have_nothing_to_be_compared_with(realnvp, tmp_path, capsys):
    path = tmp_path / "moved.ckpt"
    shutil.copy(realnvp / "checkpoints" / "best.ckpt", path)
    call("evaluate", path)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "no figures of these weights are recorded: they were not tested in their run"
    )


def test_an_interrupted_test_is_one_line(realnvp, monkeypatch):
    owner = type(load(realnvp).flow)
    interrupt_after(monkeypatch, owner, "log_prob", 2)
    line = interrupted("evaluate", realnvp)
    assert line == "stopped: nothing is written, the same command tests again"


@pytest.mark.parametrize(
    ("n", "words"), [(1, "1 unreadable file has"), (2, "2 unreadable files have")]
)
def test_unreadable_files_are_counted(n, words):
    rows = [["a.png", "3.5", "", "2.0", "1.5"], *[["b.png", "", "", "", ""]] * n]
    assert score.summary(rows) == f"1 image, mean 3.5000 bits/dim; {words} an empty row"


def test_a_run_that_is_older_than_a_key_is_tested_again(realnvp, capsys):
    config, _ = evaluate.config_of(load(realnvp), 0, {})
    del config["init_from"]
    evaluation = evaluate.Evaluation({"test/bpd": 3.5}, frozenset(), None, {}, {})
    lines = evaluate.table(config, evaluation, load(realnvp).result).splitlines()
    assert lines[-1].split()[:2] == ["realnvp_photos", "test/bpd"]
