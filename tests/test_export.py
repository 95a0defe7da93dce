"""Weights that are shared: the exported folder, and the weights beside recorded runs."""

import functools
import hashlib
import html
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from cases import TINY
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from skimage.data import chelsea

import datamodules
import results
from datamodules.bicubic import downscale, upscale
from lightning_modules.quality.super_resolution import as_uint8, low_res_psnr, psnr_y
from reproduce import export, load, realnvp_cifar10, stored
from reproduce.config import override
from reproduce.enlargers import enlarge, make_enlarger
from reproduce.model import TrainedModel
from reproduce.run_folder import read_checkpoint
from reproduce.stored import read_stored
from results import runs
from results.__main__ import main as results_main

WEIGHTS = results.ROOT / "weights"
CLAIM = {"claim": "realnvp.cifar10", "metric": "test/bpd", "decimals": 2, "value": 3.49}
FILES = ["README.md", "config.yaml", "model.safetensors", "result.json"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run of a few steps."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    words = ["trainer.max_steps=3", "samples.every_n_steps=100", f"run_dir={folder}"]
    realnvp_cifar10.main(override(TINY, words))
    return folder


def mistake(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        export.main([str(word) for word in words])
    assert isinstance(stop.value.code, str), "exit code 0 for a mistake"
    assert "\n" not in stop.value.code
    assert "Traceback" not in capsys.readouterr().err
    return stop.value.code.removeprefix("error: ")


# ---------------------------------------------------------------------- files of a run


def test_a_finished_run_has_a_file_of_its_tested_weights(run):
    path = run / "model.safetensors"
    result = json.loads((run / "result.json").read_text())
    content = path.read_bytes()
    assert result["weights"] == {
        "file": "model.safetensors",
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "dtype": "float32",
    }
    stored = load_file(path)
    tested = read_checkpoint(run / result["checkpoint"])["state_dict"]
    flow = {key: value for key, value in tested.items() if key.startswith("flow.")}
    assert stored.keys() == flow.keys()
    assert all(torch.equal(stored[key], flow[key]) for key in flow)
    with safe_open(path, "pt") as file:
        origin = json.loads(file.metadata()["paperflows"])
    assert origin["shape"] == [3, 8, 8]
    assert origin["commit"] == result["commit"]
    assert origin["config"]["run_dir"] == "tiny"  # and no path of this machine
    assert str(run.parent) not in content.decode(errors="ignore")


def test_an_exported_folder_is_complete(run, tmp_path, capsys):
    out = tmp_path / "hub"
    export.main([str(run), f"out={out}"])
    line = capsys.readouterr().out.strip()
    assert line == (
        f"{out}: model.safetensors, config.yaml, result.json, README.md; "
        f'load it with reproduce.load("{out}")'
    )
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert (out / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    result = json.loads((run / "result.json").read_text())
    assert json.loads((out / "result.json").read_text())["metrics"] == result["metrics"]
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["origin"]["shape"] == [3, 8, 8]
    assert {key: config[key] for key in ("flow", "data", "optim")} == {
        key: result["config"][key] for key in ("flow", "data", "optim")
    }
    text = "".join((out / name).read_text() for name in FILES if name.endswith(("md", "yaml")))
    assert str(tmp_path) not in text
    assert str(run.parent) not in text
    assert load(out).sample(2, seed=1).tolist() == load(run).sample(2, seed=1).tolist()


def test_an_export_is_repeated_and_goes_to_the_runs_folder_by_default(run, capsys):
    for _ in range(2):
        export.main([str(run)])
    assert sorted(path.name for path in (run / "export").iterdir()) == FILES
    before = {path.name: path.read_bytes() for path in (run / "export").iterdir()}
    export.main([str(run / "export"), f"out={run / 'again'}"])  # what was exported is exported
    assert {path.name: path.read_bytes() for path in (run / "again").iterdir()} == before


def test_a_model_card_has_the_number_beside_the_papers(run):
    stored = read_stored(run)
    result = stored.result | {
        "papers": [CLAIM | {"direction": "lower", "comparable": True}],
        "metrics": {"test/bpd": 3.6},
        "budget": {"images": 640, "of": 1280, "fraction": 0.5, "source": "ours"},
        "init_from": {"model": "outputs/a/b", "experiment": "a", "commit": None, "sha256": "12"},
        "data": {"sha256": "34ab", "n_images": {"train": 9}},
    }
    result |= results.compare_all(result)
    model = TrainedModel(stored._replace(result=result))
    text = export.exported(model)["README.md"].decode()
    head, card = text.removeprefix("---\n").split("\n---\n")
    assert yaml.safe_load(head)["tags"][-1] == "realnvp"
    row = "| test/bpd | 3.6000 | 3.49 | Density estimation using Real NVP, Table 1, "
    assert row in card
    assert " | shortened |" in card
    assert "* `shortened`: worse than the paper's number, after less training." in card
    assert "Training saw 50 % of 1.28 k images (ours)." in card
    assert "Protocol of realnvp.cifar10: n_bits: 8; " in card
    assert export.DATA_SETS["photos"] in card
    assert "SHA-256 of the images: `34ab`." in card
    assert "It started from the trained weights of outputs/a/b (SHA-256 `12`)." in card
    weights = export.exported(model)["model.safetensors"]
    assert f"SHA-256 of model.safetensors: `{hashlib.sha256(weights).hexdigest()}`" in card
    assert f"commit {stored.origin['commit'][:7]}" in card
    assert "from reproduce import load" in card


def test_a_model_card_says_why_a_figure_is_not_compared(run):
    stored = read_stored(run)
    fid = {"claim": "ddpm.cifar10_fid", "metric": "test/fid", "comparable": True}
    result = stored.result | {
        "papers": [CLAIM | {"comparable": True}, fid],
        "metrics": {"test/bpd": 3.4},
        "protocol": {"test/bpd": {"noise": "truncated"}},
        "not_measured": {"test/fid": "no weights: give metrics.inception_weights=FILE"},
    }
    model = TrainedModel(stored._replace(result=result | results.compare_all(result)))
    card = export.exported(model)["README.md"].decode()
    assert " | other protocol |" in card
    assert "* `test/bpd`: kind of noise: truncated here, uniform in the paper." in card
    assert "* `test/fid`: no weights: give metrics.inception_weights=FILE." in card
    assert "reproduced" not in card


def test_weights_without_a_test_have_a_card_too(run, tmp_path):
    out = tmp_path / "early"
    export.main([str(run / "checkpoints" / "step-00000002.ckpt"), f"out={out}"])
    assert sorted(path.name for path in out.iterdir()) == [n for n in FILES if n != "result.json"]
    assert "These weights were not tested." in (out / "README.md").read_text()
    assert load(out).result is None


def test_every_data_set_has_its_licence_in_the_card():
    assert set(datamodules.DATA) <= set(export.DATA_SETS)


def test_no_file_of_a_user_is_lost(run, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "file").touch()
    other = run / "checkpoints" / "step-00000002.ckpt"
    assert "holds a README.md already" in mistake(capsys, run, f"out={tmp_path}")
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "is a file: give a folder" in mistake(capsys, run, f"out={tmp_path / 'file'}")
    assert "is the folder of a run" in mistake(capsys, run, f"out={run}")
    export.main([str(run), f"out={tmp_path / 'hub'}"])
    assert "holds another model" in mistake(capsys, other, f"out={tmp_path / 'hub'}")
    assert "add out=FOLDER" in mistake(capsys, other)
    assert "no model gone: give the folder of a run" in mistake(capsys, "gone")
    below = tmp_path / "file" / "below"
    assert f"{below} cannot be written (Not a directory)" in mistake(capsys, run, f"out={below}")
    assert "MODEL is missing: give MODEL" in mistake(capsys)
    assert "did you mean out?" in mistake(capsys, run, "ot=x")
    assert "is no checkpoint: give" in mistake(capsys, run / "result.json", f"out={tmp_path / 'a'}")
    assert not (tmp_path / "a").exists()


def test_help_says_what_there_is(capsys):
    export.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"{key}=" in text for key in export.DEFAULTS)
    assert all(f"  {name} " in text for name in FILES)


# ---------------------------------------------------------------------- recorded weights


@pytest.fixture
def recorded_run(run, tmp_path):
    """A copy of the run, which the test may change, and a results folder."""
    folder = tmp_path / "outputs" / "tiny"
    (folder / "samples").mkdir(parents=True)
    for name in ("result.json", "curve.csv", "model.safetensors"):
        (folder / name).write_bytes((run / name).read_bytes())
    Image.new("RGB", (8, 8)).save(folder / "samples" / "samples-1.png")
    root = tmp_path / "results"
    (root / "runs").mkdir(parents=True)
    return folder, root


def add(folder, root):
    code = results_main(["add", str(folder)], root)
    path = root / "runs" / "realnvp_cifar10" / "tiny.json"
    return code, json.loads(path.read_text()) if path.is_file() else None


def test_a_recorded_run_keeps_its_weights(recorded_run, capsys, monkeypatch):
    """`load` gives the row's model, whose bits/dim are the row's figure."""
    folder, root = recorded_run
    code, row = add(folder, root)
    assert code == 0
    file = root / "weights" / "realnvp_cifar10" / "tiny.safetensors"
    assert file.read_bytes() == (folder / "model.safetensors").read_bytes()
    before = json.loads((folder / "result.json").read_text())["weights"]
    name = "weights/realnvp_cifar10/tiny.safetensors"
    assert row["weights"] == before | {"file": name}
    assert f"weights: {file}, {runs.megabytes(before['bytes'])}" in capsys.readouterr().out
    page = html.unescape((root / "index.html").read_text())
    assert f'Weights: <a href="{name}">{name}</a>, ' in page
    assert 'model = load("realnvp_cifar10/tiny")' in page
    assert add(folder, root)[0] == 0
    assert "already recorded, with the same content" in capsys.readouterr().out

    monkeypatch.setattr(results, "ROOT", root)
    model = load("realnvp_cifar10/tiny")
    data = datamodules.make_data(seed=0, **model.config.data)
    data.setup()
    images = torch.stack([data.test[0, i][0] for i in range(len(data.test))])
    value = model.bits_per_dim(images).double().mean().item()
    assert value == pytest.approx(model.result["metrics"]["test/bpd"], 1e-6)
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is not the file whose sha256 is recorded"):
        load("realnvp_cifar10/tiny")


def test_large_weights_are_not_kept(recorded_run, capsys, monkeypatch):
    folder, root = recorded_run
    monkeypatch.setattr(runs, "WEIGHTS_BYTES", 1000)
    code, row = add(folder, root)
    assert (code, row["weights"]) == (0, None)
    assert not (root / "weights").exists()
    lines = capsys.readouterr().out
    assert re.search(r"no weights are kept: they are 0.\d+ MB, and at most 0.001 MB are", lines)


def test_all_weights_together_have_a_limit(recorded_run, capsys, monkeypatch):
    folder, root = recorded_run
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(runs, "ALL_WEIGHTS_BYTES", size + 10)
    other = root / "weights" / "glow_photos" / "big.safetensors"
    other.parent.mkdir(parents=True)
    other.write_bytes(bytes(11))
    code, row = add(folder, root)
    assert (code, row["weights"]) == (0, None)
    limit = runs.megabytes(size + 10)
    assert f"would grow to {limit}, and may have {limit}" in capsys.readouterr().out
    other.write_bytes(bytes(10))
    (root / "runs" / "realnvp_cifar10" / "tiny.json").unlink()
    assert add(folder, root)[1]["weights"]["bytes"] == size
    own = root / "weights" / "realnvp_cifar10" / "tiny.safetensors"
    (root / "runs" / "realnvp_cifar10" / "tiny.json").unlink()
    assert own.is_file()  # the same file again does not count twice
    assert add(folder, root)[1]["weights"]["bytes"] == size


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_bytes(b"other")])
def test_weights_that_are_not_those_of_the_result_stop_the_record(recorded_run, change, capsys):
    folder, root = recorded_run
    change(folder / "model.safetensors")
    assert add(folder, root) == (1, None)
    line = capsys.readouterr().err
    assert line.startswith(f"error: {folder / 'model.safetensors'} is missing, or is not the file")
    assert line.count("\n") == 1
    assert not (root / "weights").exists()


def test_an_older_run_is_exported_first(run, recorded_run, capsys):
    """Its result says nothing of weights."""
    folder, root = recorded_run
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"weights": None}))
    (folder / "model.safetensors").unlink()
    assert add(folder, root)[1]["weights"] is None
    assert f"python -m reproduce.export {folder}, then record" in capsys.readouterr().out
    (root / "runs" / "realnvp_cifar10" / "tiny.json").unlink()

    export.main([str(run), f"out={folder / 'export'}"])
    _, row = add(folder, root)
    assert row["weights"]["file"] == "weights/realnvp_cifar10/tiny.safetensors"
    assert (root / row["weights"]["file"]).is_file()

    path = folder / "export" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metrics": {"test/bpd": 1.0}}))
    assert add(folder, root)[0] == 1
    assert "is of other weights than" in capsys.readouterr().err


# ---------------------------------------------------------------------- those of this repository

ROWS = sorted(path.relative_to(WEIGHTS).with_suffix("") for path in WEIGHTS.glob("*/*.safetensors"))


def enlarges(row):
    """Whether the weights are those of a model for super-resolution."""
    return row.parent.name.startswith(("srflow_", "rrdb_"))


def test_the_weights_of_this_repository_are_small_and_have_rows():
    sizes = [(WEIGHTS / f"{row}.safetensors").stat().st_size for row in ROWS]
    assert max(sizes, default=0) <= runs.WEIGHTS_BYTES == 8_000_000
    assert sum(sizes) <= runs.ALL_WEIGHTS_BYTES == 40_000_000
    others = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert len(others) == len(ROWS) + 1  # with README.md
    recorded = {
        Path(run["experiment"], run["run"]) for run in runs.read_runs() if run.get("weights")
    }
    assert recorded == set(ROWS)


@pytest.mark.parametrize("row", [row for row in ROWS if not enlarges(row)], ids=str)
def test_a_row_of_this_repository_loads(row):
    model = load(str(row))
    samples = model.sample(2, temperature=0.7)
    assert len(samples.unique()) > 10
    labels = list(model.class_names[:2]) or None
    assert model.bits_per_dim(samples, labels).isfinite().all()


@pytest.mark.parametrize("row", [row for row in ROWS if enlarges(row)], ids=str)
def test_a_row_for_super_resolution_is_better_than_bicubic_interpolation(row):
    """On a photograph of scikit-image that it was not trained on, without the border."""
    image = torch.from_numpy(chelsea()[:256, 100:356].copy()).permute(2, 0, 1)[None]
    low_res = downscale(image, 4)
    enlarger = make_enlarger(read_stored(str(row)), str(row), "cpu", 1, 0.0, 0)
    enlarged = as_uint8(enlarge(enlarger, low_res[0], 0, 0).images)
    bicubic = upscale(low_res, 4)
    assert psnr_y(enlarged, image, 4) > psnr_y(bicubic, image, 4) + 0.2
    reduce = functools.partial(downscale, scale=4)
    assert low_res_psnr(enlarged, low_res, reduce) > low_res_psnr(bicubic, low_res, reduce) + 1


def test_a_row_is_computed_again_from_its_weights_on_photographs():
    """Bits per dimension of 200 crops, as they were when the weights were recorded."""
    bits = {"glow_cifar10/cpu-seed0": 3.73425, "realnvp_cifar10/cpu-seed0": 3.91327}
    data = datamodules.make_data("photos", seed=0, batch_size=64, n_test=200)
    data.setup()
    images = torch.stack([data.test[0, i][0] for i in range(200)])
    for row, expected in bits.items():
        assert load(row).bits_per_dim(images).mean() == pytest.approx(expected, abs=5e-4)


@pytest.mark.data
def test_a_row_is_computed_again_from_its_weights_on_its_test_images():
    """Bits per dimension of the first 200 of its 10,000 test images."""
    if not (Path("data") / "cifar-10-batches-py" / "test_batch").is_file():
        pytest.skip("CIFAR-10 is not under data/")
    bits = {"glow_cifar10/cpu-seed0": 3.81519, "realnvp_cifar10/cpu-seed0": 3.99293}
    for row, expected in bits.items():
        model = load(row)
        data = datamodules.make_data(seed=0, **{**model.config.data, "root": "data"})
        data.prepare_data()
        data.setup()
        images = torch.stack([data.test[0, i][0] for i in range(200)])
        values = model.bits_per_dim(images, seed=model.config.eval.noise_seed)
        assert values.mean() == pytest.approx(expected, abs=5e-4)
        error = values.std() / 200**0.5
        assert abs(values.mean() - model.result["metrics"]["test/bpd"]) < 4 * error


def test_the_folders_of_images_come_back_from_the_result_beside_the_weights():
    """The weights' metadata have only the last part of each path."""
    config = {"data": {"root": ["train"], "test_root": "set", "val_root": None, "cache": None}}
    folders = {"root": ["/data/train"], "test_root": "/data/set", "val_root": None}
    stored._restore_paths(config, {"data": folders | {"crop": 8}})
    assert config == {"data": folders | {"cache": None}}
    stored._restore_paths(config, None)
    assert config == {"data": folders | {"cache": None}}
