"""A run that starts from trained weights: what is loaded, what is new, and what is refused."""

import csv
import hashlib
import json
import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import TINY, Run

from datamodules.dequantization import UniformDequantizer
from reproduce import glow_photos, init_from, realnvp_cifar10
from reproduce.config import ConfigError, compose, override
from reproduce.experiment import papers_of
from reproduce.init_from import InitFrom
from reproduce.run_folder import read_checkpoint, step_checkpoints
from reproduce.stored import EXPORTED, Stored, as_safetensors, read_stored

GLOW = [word for word in TINY if not word.startswith(("flow.", "eval.bn_images"))]
GLOW += ["flow.n_levels=2", "flow.depth=1", "flow.hidden_channels=4"]
SHAPE = (3, 8, 8)
SHORT = "trainer.max_steps=4"


def realnvp(folder, *arguments):
    return realnvp_cifar10.main(override([*TINY, f"run_dir={folder}"], arguments))


def glow(folder, *arguments):
    return glow_photos.main(override([*GLOW, f"run_dir={folder}"], arguments))


def refused(run, folder, *arguments):
    """The line with which a command ends that makes nothing."""
    with pytest.raises(SystemExit) as end:
        run(folder, *arguments)
    assert not (folder / "config.yaml").exists()
    return end.value.code.removeprefix("error: ")


def first_validation(folder):
    """val/bpd before the first step."""
    with (folder / "curve.csv").open() as file:
        row = next(csv.DictReader(file))
    assert row["step"] == "0"
    return float(row["val/bpd"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of a RealNVP and a Glow of 4 steps."""
    folder = tmp_path_factory.mktemp("trained")
    realnvp(folder / "realnvp", SHORT)
    glow(folder / "glow", SHORT)
    return folder


@pytest.mark.parametrize("run", [realnvp, glow])
def test_a_run_starts_with_the_tested_weights_and_all_else_is_new(trained, tmp_path, run):
    """The other seed would give other first weights, and other values to ActNorms."""
    source = trained / run.__name__
    before = json.loads((source / "result.json").read_text())
    words = [f"init_from={source}", "trainer.max_steps=2", "seed=5", "optim.lr=0.01"]
    result = run(tmp_path / "run", *words, "data.n_train=32")
    assert first_validation(tmp_path / "run") == before["metrics"]["val/bpd"]
    assert result["metrics"]["val/bpd"] != before["metrics"]["val/bpd"]
    file = source / EXPORTED
    assert result["init_from"] == {
        "model": str(source),
        "file": str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "experiment": before["experiment"],
        "commit": before["commit"],
        "shape": [3, 8, 8],
        "images": 64,
    }
    assert result["init_from"]["sha256"] == before["weights"]["sha256"]
    assert (result["images"], result["budget"]) == (32, None)
    final = read_checkpoint(step_checkpoints(tmp_path / "run")[0])
    assert final["global_step"] == 2
    assert {state["step"].item() for state in final["optimizer_states"][0]["state"].values()} == {2}
    assert "init_from" not in before


def test_averaged_weights_start_from_the_loaded_ones(trained, tmp_path):
    words = [f"init_from={trained / 'glow'}", "trainer.max_steps=3", "ema.decay=0.5"]
    glow(tmp_path / "run", *words, "optim.lr=0")
    averaged = read_stored(tmp_path / "run").weights
    loaded = read_stored(trained / "glow").weights
    assert averaged.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[key]) for key, value in averaged.items())


def test_the_checkpoint_of_the_folder_is_newer(trained, tmp_path):
    """A repeated command goes on, also where the first weights are gone by then."""
    source = tmp_path / "source"
    shutil.copytree(trained / "glow", source)
    start = f"init_from={source}"
    whole = glow(tmp_path / "whole", start, "trainer.max_steps=5")
    glow(tmp_path / "run", start, "trainer.max_steps=2", "resume=auto")
    shutil.rmtree(source)
    extended = glow(tmp_path / "run", start, "trainer.max_steps=5", "resume=auto")
    assert extended["metrics"] == whole["metrics"]
    assert extended["init_from"] == whole["init_from"]
    line = f"{tmp_path / 'run'} is finished, and was trained with {start}: say the same"
    for other in ("init_from=null", f"init_from={trained / 'glow'}"):
        with pytest.raises(SystemExit, match=line):
            glow(tmp_path / "run", other, "trainer.max_steps=5", "resume=auto")


def test_images_of_another_size_are_taken_where_the_weights_fit(trained, tmp_path):
    result = glow(
        tmp_path / "run", f"init_from={trained / 'glow'}", "data.size=16", "trainer.max_steps=1"
    )
    assert result["init_from"]["shape"] == [3, 8, 8]
    assert 7 < first_validation(tmp_path / "run") < 9


def test_an_exported_folder_is_a_start(trained, tmp_path):
    stored = read_stored(trained / "glow")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / EXPORTED).write_bytes(as_safetensors(stored))
    module = module_for("glow_photos", GLOW, SHAPE)
    start = InitFrom()
    start.load(config_for("glow_photos", GLOW, tmp_path / "model"), module)
    assert not module.needs_initialization()
    weights = module.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in stored.weights.items())
    record = start.record["init_from"]
    assert record["file"] == str(tmp_path / "model" / EXPORTED)
    assert record["images"] is None


def config_for(experiment, words, model):
    return compose(experiment, [*words, f"init_from={model}"])


def module_for(experiment, words, shape):
    """A new objective for data of a shape."""
    script = import_module(f"reproduce.{experiment}")
    config = compose(experiment, words)
    data = SimpleNamespace(shape=shape, n_bits=8, dequantizer=UniformDequantizer(8), labels=False)
    return script.make_module(config, script.make_flow(config, shape), data)


def test_other_shapes_are_named_and_nothing_is_loaded(trained):
    module = module_for("glow_photos", GLOW, (1, 8, 8))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(ConfigError) as refusal:
        InitFrom().load(config_for("glow_photos", GLOW, trained / "glow"), module)
    line = str(refusal.value)
    assert line.startswith(f"{trained / 'glow' / EXPORTED} does not fit")
    assert line.endswith("; they are of data of shape 3 x 8 x 8, and here are data of 1 x 8 x 8")
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_another_architecture_is_named(trained, tmp_path):
    line = refused(
        glow, tmp_path / "run", f"init_from={trained / 'glow'}", "flow.depth=2", "flow.alpha=0.05"
    )
    assert line == (
        f"init_from={trained / 'glow'} was trained with flow.alpha=null flow.depth=1: say the same"
    )


def test_another_model_is_named(trained, tmp_path):
    line = refused(glow, tmp_path / "run", f"init_from={trained / 'realnvp'}")
    assert line == (
        f"init_from={trained / 'realnvp'} is a RealNVP of realnvp_cifar10, and glow_photos trains "
        "a Glow: give weights of that"
    )


def test_weights_of_no_flow_are_refused(monkeypatch):
    """An objective without a flow has other keys, of which none is loaded."""
    stored = Stored({}, {"experiment": "denoiser", "config": {}}, None, Path("x.ckpt"))
    monkeypatch.setattr(init_from, "read_stored", lambda model: stored)
    with pytest.raises(ConfigError, match="init_from=x is of denoiser, which trains no flow"):
        InitFrom().load(
            config_for("glow_photos", GLOW, "x"), module_for("glow_photos", GLOW, SHAPE)
        )


def test_an_older_finished_run_has_started_from_random_weights(trained, tmp_path, capsys):
    """Its config has no key init_from."""
    shutil.copytree(trained / "glow", tmp_path / "run")
    path = tmp_path / "run" / "result.json"
    result = json.loads(path.read_text())
    assert result["config"].pop("init_from") is None
    path.write_text(json.dumps(result))
    with pytest.raises(SystemExit) as end:
        glow(tmp_path / "run", SHORT, "resume=auto")
    assert end.value.code == 0
    assert "is finished: see" in capsys.readouterr().out


def test_what_does_not_exist_is_named(tmp_path):
    line = refused(glow, tmp_path / "run", "init_from=glow_cifar10/no-such-run")
    assert line.startswith("no model glow_cifar10/no-such-run")
    line = refused(glow, tmp_path / "run", "finetune=outputs/mine")
    assert "did you mean init_from?" in line


def test_a_run_from_trained_weights_is_no_reproduction():
    """It has had more training, perhaps on other images, than its own."""
    words = ["init_from=outputs/mine"]
    assert [paper["comparable"] for paper in papers_of(compose("glow_cifar10", []))] == [True]
    assert [paper["comparable"] for paper in papers_of(compose("glow_cifar10", words))] == [False]


def test_two_ranks_start_from_the_same_weights(trained, tmp_path):
    run = Run(
        tmp_path / "run",
        *(f"init_from={trained / 'realnvp'}", "trainer.max_steps=1", "ema.decay=0.5"),
        *("trainer.devices=2", "trainer.strategy=ddp", "optim.lr=0", "eval.bn_images=0"),
        ranks=2,
    )
    assert run.wait() == [0, 0], run.output()
    averaged = read_stored(tmp_path / "run").weights
    loaded = read_stored(trained / "realnvp").weights
    parameters = [key for key in loaded if not key.endswith(("running_mean", "running_var"))]
    for key in parameters:
        if loaded[key].is_floating_point():
            assert torch.equal(averaged[key], loaded[key]), key
    validated = json.loads((trained / "realnvp" / "result.json").read_text())["metrics"]["val/bpd"]
    assert first_validation(tmp_path / "run") == pytest.approx(validated, rel=1e-6)
