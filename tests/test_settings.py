"""What a setting may be: its key decides how its text is read, and a mistake is one line.

The mistakes of a command line are tried without a training run wherever that is enough.
"""

import functools
import json
import math
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import lightning.pytorch as L
import pytest
import torch
from cases import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

import results
from datamodules import make_data
from lightning_modules.density import DensityModule
from reproduce import experiment, glow_photos, grid, readiness, realnvp_cifar10, run_folder
from reproduce.command import command
from reproduce.config import CONFIGS, ConfigError, compose, override
from reproduce.kinds import (
    Anything,
    Choice,
    Either,
    Integer,
    ListOf,
    Nullable,
    Number,
    Share,
    Switch,
    Text,
    Time,
    WrongValue,
    argument_text,
    guess,
)
from reproduce.schema import ALIASES, PATH, Schema, constructors, kind_of
from reproduce.sweep import agent_arguments

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "base")
CIFAR = "realnvp_cifar10"


def value(argument, recipe=CIFAR):
    """What a recipe makes of key=text."""
    return OmegaConf.select(compose(recipe, [argument]), argument.partition("=")[0])


def refused(*arguments, recipe=CIFAR):
    """The one line that a command line is answered with before anything is built."""
    with pytest.raises(ConfigError) as error:
        compose(recipe, list(arguments))
    message = str(error.value)
    assert "\n" not in message
    return message


def mistake(main, *arguments):
    """The one line that a script ends with."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert isinstance(stop.value.code, str), f"exit code {stop.value.code} for a mistake"
    assert "\n" not in stop.value.code
    return stop.value.code.removeprefix("error: ")


# ---------------------------------------------------------------------- kinds


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (Integer(), "12", 12),
        (Integer(), "-3", -3),
        (Integer(), "1e5", 100_000),
        (Integer(), "8.0", 8),
        (Integer(), "9007199254740993", 2**53 + 1),
        (Number(), "5e-4", 5e-4),
        (Number(), "1", 1.0),
        (Number(), ".5", 0.5),
        (Number(), "-2.", -2.0),
        (Switch(), "true", True),
        (Switch(), "False", False),
        (Text(), "20261127", "20261127"),
        (Text(), "null", "null"),
        (Nullable(Text()), "null", None),
        (Nullable(Number()), "", None),
        (Time(), "10:00:00:00", "10:00:00:00"),
        (Choice(("a", "b"), {"c": "b"}), "c", "b"),
        (Share(), "1", 1),
        (Share(), "1.0", 1.0),
        (ListOf(Number()), "[0,0.5]", [0.0, 0.5]),
        (ListOf(Text()), "['a', b]", ["a", "b"]),
        (ListOf(Number()), "[]", []),
        (ListOf(Integer()), ["1", "2"], [1, 2]),
        (Either((Integer(low=1), Choice(("auto",)))), "auto", "auto"),
        (Anything(), "[1, x]", [1, "x"]),
    ],
)
def test_a_kind_reads_a_text(kind, text, expected):
    result = kind.read(text)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (Integer(), ["", "1.5", "1_000", "0x10", "010", "1:30", "true", "nan", "1e30", "٣"]),
        (Integer(low=1, high=8), ["0", "9", "-1", "1e400"]),
        (Number(), ["", "nan", "inf", "-inf", "1e400", "1_0.0", "0x1p3", "true", "one", "1 "]),
        (Number(low=0, below=1), ["-0.1", "1", "1.0"]),
        (Number(above=0), ["0", "-1e-9"]),
        (Switch(), ["yes", "on", "1", "0", ""]),
        (Text(), ["", " ", "[a]", "{}", "a\nb", "a\x00", "???", "a" * 5000]),
        (Time(), ["1", "1:2:3:4:5", "00:24:00:00", "00:00:60:00", "00:00:00:00", "1:00:00"]),
        (Choice(("a", "b")), ["", "A", "ab", "[a]"]),
        (Share(), ["-1", "1.5", "half"]),
        (ListOf(Number()), ["1", "[1", "[a]", "[[1]]", "{}", "[1,]"]),
        (ListOf(Number(), n=2), ["[1]", "[1,2,3]"]),
        (ListOf(Number(), least=1), ["[]"]),
        (Either((Integer(low=1), Choice(("auto",)))), ["0", "all", "null"]),
    ],
)
def test_a_kind_refuses_a_text(kind, texts):
    for text in texts:
        with pytest.raises(WrongValue):
            kind.read(text)


@pytest.mark.parametrize("kind", [Integer(), Number(), Text(), Switch(), Nullable(Integer())])
@pytest.mark.parametrize("raw", [{}, {"a": "1"}, ["1"], []])
def test_a_value_is_no_section_and_no_list(kind, raw):
    with pytest.raises(WrongValue, match="wrong type"):
        kind.read(raw)


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [
        (int, Integer()),
        (float, Number()),
        (bool, Switch()),
        (str, Text()),
        (Path, PATH),
        (str | Path, PATH),
        (int | None, Nullable(Integer())),
        (float | str, Either((Number(), Text()))),
        (list[float], ListOf(Number())),
        (tuple[float, float], ListOf(Number(), n=2)),
        (tuple[int, ...], ListOf(Integer())),
        (Literal["a", "b"], Choice(("a", "b"))),
        (Literal["a", "b"] | None, Nullable(Choice(("a", "b")))),
        (torch.Tensor, Anything()),
        (torch.Tensor | int, Integer()),
    ],
)
def test_an_annotation_is_a_kind(annotation, kind):
    assert kind_of(annotation) == kind


def test_the_example_of_a_kind_is_of_the_kind():
    kinds = [kind for recipe in RECIPES for kind in Schema(recipe).kinds.values()]
    for kind in kinds:
        kind.read(kind.example)
        assert kind.name


def test_a_value_as_text_is_read_back():
    for each in (1, 0.5, 1e-05, True, None, "a", [0.5, 1.0], ["a", "b"], []):
        assert guess(argument_text(each)) == each


# ---------------------------------------------------------------------- the table


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_key_of_a_recipe_has_a_kind(recipe):
    """It comes from the constructor to which the key's section goes, or from the table OWN."""
    config = compose(recipe, [])
    schema = Schema(recipe)
    schema.use_data(config.data.name)
    sections = OmegaConf.to_container(config)
    keys = {key for key, part in sections.items() if not isinstance(part, dict)}
    for section, part in sections.items():
        keys |= {f"{section}.{name}" for name in part} if isinstance(part, dict) else set()
    assert keys - {"experiment", "preset"} <= schema.kinds.keys()
    untyped = {key for key in keys & schema.kinds.keys() if is_untyped(schema.kinds[key])}
    assert untyped == set()


def is_untyped(kind):
    return isinstance(getattr(kind, "kind", kind), Anything)


def test_the_classes_of_a_recipe_are_those_that_its_script_names():
    classes = constructors("glow_cifar10_conditional")
    assert {section: each.__name__ for section, each in classes.items()} == {
        "flow": "Glow",
        "optim": "ClassConditionalModule",
        "eval": "ClassConditionalModule",
    }
    assert constructors("no_such_recipe") == {}


def test_arguments_that_a_class_hands_on_have_kinds():
    """ClassConditionalModule names one of them, and takes the others of DensityModule."""
    kinds = Schema("glow_cifar10_conditional").kinds
    assert kinds["optim.class_weight"] == Number()
    assert kinds["optim.clip_norm"] == Nullable(Number())
    assert kinds["optim.lr"] == Number()


# ---------------------------------------------------------------------- command lines


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("run_dir=20261127", "20261127"),
        ("run_dir=true", "true"),
        ("run_dir=3", "3"),
        ("run_dir=1:30", "1:30"),
        ("run_dir=null", None),
        ("data.root=010", "010"),
        ("trainer.max_time=10:00:00:00", "10:00:00:00"),
        ("trainer.max_time=00:00:00:30", "00:00:00:30"),
        ("trainer.max_steps=1e5", 100_000),
        ("trainer.precision=16", "16-mixed"),
        ("trainer.precision=bf16", "bf16-mixed"),
        ("trainer.precision=32", "32-true"),
        ("logger.project=123", "123"),
        ("trainer.limit_test_batches=1", 1),
        ("trainer.limit_test_batches=1.0", 1.0),
        ("optim.lr=1e-3", 0.001),
        ("ema.decay=0", 0.0),
        ("data.micro_batch=8", 8),
        ("flow.alpha=0", 0.0),
        ("run_dir='my run'", "my run"),
        ('logger.name="csv"', "csv"),
        ("optim.lr='1e-3'", 0.001),
        ("seed= 3 ", 3),
        ("trainer.devices='2'", 2),
        ("trainer.devices=-1", -1),
        ("trainer.devices=0,1", [0, 1]),
        ("trainer.strategy=ddp_find_unused_parameters_true", "ddp_find_unused_parameters_true"),
        ("samples.temperatures=[0.7]", [0.7]),
        ("seed=0e-999999999999999999999", 0),
    ],
)
def test_the_key_decides_how_a_text_is_read(argument, expected):
    result = value(argument)
    assert result == expected
    if not isinstance(expected, list):  # OmegaConf has a list of its own
        assert type(result) is type(expected)


NUMBERS = ["nan", "inf", "abc", "true", "1:30", "1_000", "0x10", "010", "[1]", "{}", "${seed"]


@pytest.mark.parametrize("text", NUMBERS)
@pytest.mark.parametrize(
    "key", ["optim.clip_norm", "optim.lr", "flow.alpha", "seed", "trainer.max_steps", "ema.decay"]
)
def test_a_number_is_decimal(key, text):
    assert refused(f"{key}={text}").startswith(f"{key}={text} has the wrong type: give ") or (
        "a config's own syntax" in refused(f"{key}={text}")
    )


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (
            "optim.clip_norm=abc",
            "wrong type: give a float, or null, for example optim.clip_norm=100",
        ),
        ("trainer.max_time=1", "wrong type: give a time as DD:HH:MM:SS, or null, for example"),
        ("trainer.max_time=1:2:3:4:5", "wrong type: give a time as DD:HH:MM:SS"),
        ("optim.lr={}", "optim.lr={} has the wrong type: give a float, for example optim.lr=0.001"),
        ("optim.betas={}", "optim.betas={} has the wrong type: give a list"),
        ("samples.temperatures={}", "wrong type: give a list of at least 1"),
        ("optim={lr: 0.1}", "optim is a section, not a value: give optim.KEY="),
        ("trainer.precision=16-true", "is not known"),
        ("trainer.precision=bf16-true", "give one of auto, 32-true, bf16-mixed, 16-mixed"),
        ("trainer.precision=64-true", "give one of auto, 32-true, bf16-mixed, 16-mixed"),
        ("trainer.precision=transformer-engine", "give one of auto, 32-true, bf16-mixed"),
        ("trainer.accelerator=tpu", "give one of auto, cpu, gpu, cuda, mps"),
        ("trainer.strategy=ddp_spawn", "give one of auto, ddp"),
        (f"logger.project={'a' * 300}", "is too long: give a name of at most 128 characters"),
        ("logger.project=a/b", "wrong type: give a name"),
        ("samples.temperatures=[-1]", "is out of range"),
        ("samples.temperatures=[0.5,true]", "wrong type"),
        ("samples.every_n_steps=-1", "is out of range: give an int from 1"),
        ("budget.images=-1", "is out of range: give an int from 1"),
        ("ema.decay=1.0", "is out of range: give a float from 0 below 1"),
        ("seed=-1", "is out of range: give an int from 0"),
        ("seed=1e30", "is out of range"),
        ("trainer.devices=0", "is out of range: give an int from 1, auto, -1 for all GPUs, or"),
        ("trainer.devices=-2", "is out of range"),
        ("trainer.devices=[]", "has the wrong length"),
        ("trainer.devices=[0,0]", "names a device twice"),
        ("trainer.devices=0,x", "wrong type"),
        ("seed=1e-400", "wrong type"),
        ("optim.lr=1e-400", "is out of range"),
        ("--seed=3", "'--seed=3' is not of the form key=value (did you mean seed=3?)"),
        ("trainer.val_check_interval=0", "is out of range: give an int from 1"),
        ("trainer.limit_test_batches=1.5", "is out of range"),
        ("run_dir={}", "wrong type: give a path"),
        ("data.hflip=yes", "wrong type: give a bool, true or false"),
    ],
)
def test_a_wrong_value_is_one_line_that_says_what_to_give(argument, said):
    message = refused(argument)
    assert said in message
    assert len(message) < 400


@pytest.mark.parametrize("foreign", ALIASES)
def test_a_setting_s_name_in_other_programs_leads_to_its_key(foreign):
    """Also as `trainer.<name>`, where Lightning's users look for it."""
    key = ALIASES[foreign]
    recipe = "glow_photos" if key in ("flow.depth", "flow.n_levels", "data.size") else CIFAR
    if foreign != key.split(".")[0]:  # a section's own name is answered with its keys
        assert f"(did you mean {key}?)" in refused(f"{foreign}=1", recipe=recipe)
    assert f"(did you mean {key}?)" in refused(f"trainer.{foreign}=1", recipe=recipe)


@pytest.mark.parametrize(
    ("argument", "key"),
    [
        ("gradient_clip_val=1", "optim.clip_norm"),
        ("trainer.gradient_clip_val=1", "optim.clip_norm"),
        ("learning_rate=1", "optim.lr"),
        ("epochs=3", "trainer.max_epochs"),
        ("max_epochs=3", "trainer.max_epochs"),
        ("batch_size=3", "data.batch_size"),
        ("gpus=2", "trainer.devices"),
        ("devices=2", "trainer.devices"),
        ("precision=16", "trainer.precision"),
        ("seed_everything=1", "seed"),
    ],
)
def test_well_known_names_of_lightning(argument, key):
    assert f"(did you mean {key}?)" in refused(argument)


def test_a_name_leads_only_to_a_key_that_the_recipe_has():
    assert "data.root" not in refused("data_dir=x", recipe="realnvp_moons")


def test_a_recipe_is_read_by_the_same_table(tmp_path, monkeypatch):
    """YAML would read 1:30 as 90, 010 as 8 and a folder of digits as a number."""
    shutil.copytree(CONFIGS, tmp_path / "configs")
    monkeypatch.setattr("reproduce.config.CONFIGS", tmp_path / "configs")
    path = tmp_path / "configs" / "realnvp_moons.yaml"
    text = path.read_text()
    path.write_text(f"{text}run_dir: 20261127\nseed: 1e2\n")
    config = compose("realnvp_moons", [])
    assert (config.run_dir, config.seed) == ("20261127", 100)
    for line in ("seed: 1:30", "seed: 010", "ema: {decay: 1.0}", "trainer: {precision: 64-true}"):
        key = line.partition(":")[0]
        path.write_text(text.replace(f"\n{key}:", f"\nunused_{key}:").split("unused_")[0] + line)
        message = refused(recipe="realnvp_moons")
        assert str(path) in message
        assert "give" in message


def test_an_agents_value_is_read_by_the_same_table(monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "abcd1234")
    monkeypatch.setenv("WANDB_RUN_ID", "kd83hsl0")
    words = agent_arguments(["optim.clip_norm=None", "data.hflip=True", "seed=3.0"], CIFAR)
    config = compose(CIFAR, words)
    assert (config.optim.clip_norm, config.data.hflip, config.seed) == (None, True, 3)
    for word in ("optim.lr=0x10", "optim.lr=1_000", "seed=True", "optim.lr={'a': 1}"):
        with pytest.raises(ConfigError):
            compose(CIFAR, agent_arguments([word], CIFAR))


# ---------------------------------------------------------------------- before a run


def load(*words, name=CIFAR, folder=None):
    """The config of a script, after all checks that come before anything is built."""
    where = [] if folder is None else [f"run_dir={folder}"]
    return experiment.load_config(f"{name}.py", "", [*words, *where])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.devices=100000"], "trainer.devices=100000, but there are "),
        (["trainer.num_nodes=2"], "but nobody starts the other nodes: use sbatch"),
        (["trainer.max_steps=0"], "trainer.max_steps=0 trains nothing"),
        (["trainer.max_epochs=0"], "trainer.max_epochs=0 trains nothing"),
        (["trainer.precision=16", "trainer.accelerator=cpu"], "16-mixed needs a GPU"),
        (["trainer.limit_test_batches=0"], "tests nothing"),
    ],
)
def test_what_cannot_start_or_end_is_refused_before_anything_is_built(words, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        load(*words, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_nodes_are_started_by_a_launcher(monkeypatch, tmp_path):
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("NODE_RANK", "0")
    assert load("trainer.num_nodes=2", folder=tmp_path / "run").trainer.num_nodes == 2


def test_what_is_recorded_is_the_precision_that_trains(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = load("trainer.precision=16", "trainer.accelerator=gpu", folder=tmp_path / "run")
    assert config.trainer.precision == "16-mixed"


@pytest.mark.parametrize("words", [["data.n_test=0"], ["trainer.limit_test_batches=0.001"]])
def test_a_test_without_data_is_refused_before_the_first_step(words, tmp_path):
    folder = tmp_path / "run"
    given_words = override([*TINY, f"run_dir={folder}", "trainer.max_steps=2"], words)
    line = mistake(realnvp_cifar10.main, *given_words)
    assert words[0].partition("=")[0] in line
    assert "give" in line
    assert not (folder / "curve.csv").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_agree_that_a_share_is_less_than_one_batch(rank):
    """Of 5 items in batches of 2, rank 0 has two batches and rank 1 has one."""
    data = make_data("two_moons", seed=0, batch_size=4, n_train=8, n_val=0, n_test=5)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
    data.setup()
    config = OmegaConf.create({"data": {"n_val": 0}, "trainer": {"limit_val_batches": None}})
    config.trainer.limit_test_batches = 0.5
    trainer = SimpleNamespace(datamodule=data, callbacks=[], world_size=2)
    with pytest.raises(ConfigError, match=r"limit_test_batches=0\.5 .* \(batches: 1\)"):
        readiness.Readiness(config).setup(trainer, None, "fit")


def test_a_share_of_the_batches_that_is_none_says_the_least_share(tmp_path):
    words = [*TINY, f"run_dir={tmp_path / 'run'}", "trainer.limit_val_batches=0.01"]
    line = mistake(realnvp_cifar10.main, *words, "trainer.max_steps=2")
    assert line == (
        "trainer.limit_val_batches=0.01 is less than one batch (batches: 2): give at least 0.5, "
        "a number of batches as an int, or null for all"
    )


def test_the_least_share_that_is_advised_is_one_batch():
    for n in range(1, 3000):
        share = readiness.share_of_one(n)
        assert int(share * n) >= 1
        assert share <= 1
        assert len(str(share)) <= 7


def test_a_run_that_is_refused_leaves_no_folder(tmp_path):
    """Also where the mistake shows only after the folder was opened, to hold it and to log."""
    for word in ("data.micro_batch=3", "trainer.limit_test_batches=0.01", "optim.cooldown_steps=9"):
        words = override([*TINY, "trainer.max_steps=2", "logger.name=csv"], [word])
        mistake(realnvp_cifar10.main, *words, f"run_dir={tmp_path / 'run'}")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["notes.md", "log.txt", "lock", "old/log.txt", "old/lock"])
def test_a_run_that_is_refused_removes_nothing_of_its_user(name, tmp_path):
    """Also if a file has the name of one of a run's own."""
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine\n")
    words = override(TINY, ["logger.name=csv", "trainer.limit_test_batches=0.01"])
    mistake(realnvp_cifar10.main, *words, f"run_dir={tmp_path / 'mine'}")
    assert path.read_text().startswith("mine\n")


def test_a_run_that_is_refused_leaves_the_run_that_another_process_begins_there(tmp_path):
    """The other one makes files after this one has looked for them, and before it tidies up."""
    folder = tmp_path / "run"
    run_folder.open_folder(folder)
    unlink = Path.unlink

    def begin(path, missing_ok=False):
        unlink(path, missing_ok=missing_ok)
        (folder / "curve.csv").write_text("other")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", begin)
        run_folder.leave_no_empty_run()
    assert (folder / "curve.csv").read_text() == "other"


@pytest.mark.parametrize("curve", ["step;images\n0;0\n", "step,images\nx,y\n", "\0\0\0"])
def test_a_run_goes_on_beside_a_damaged_curve(curve, tmp_path):
    """Its checkpoints hold the curve, too, and it is written anew."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000002.ckpt").touch()
    (tmp_path / "curve.csv").write_text(curve)
    assert load("resume=auto", folder=tmp_path).resume == "auto"


def test_a_run_without_a_finite_step_says_what_to_change(tmp_path):
    words = [*TINY, "trainer.max_steps=2", "optim.l2=1e30", f"run_dir={tmp_path / 'run'}"]
    assert "no step of the run was finite. Lower optim.lr" in mistake(realnvp_cifar10.main, *words)
    assert (tmp_path / "run" / "curve.csv").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.devices=-1"], "trainer.devices=-1 means GPUs, and this run is on the CPU"),
        (["trainer.devices=0,1"], "trainer.devices=[0, 1] means GPUs, and this run is on the CPU"),
        (
            ["run_dir=~nobody-here/x"],
            "run_dir=~nobody-here/x: ~nobody-here is not the home folder",
        ),
        (["flow.n_blocks=1e9"], "flow.n_blocks=1000000000 is out of range: give a whole number"),
        (["flow.n_scales=1e18"], "flow.n_scales=1000000000000000000 is out of range"),
        (["flow.hidden_channels=0"], "flow.hidden_channels=0 is out of range"),
        (["flow.alpha=0.5"], "flow.alpha=0.5 is out of range"),
        (["data.size=7"], "give at most flow.n_scales=1, or sides that are multiples of 2"),
        (["eval.noise_samples=1e15"], "eval.noise_samples=1000000000000000 is out of range"),
        (["paper=x"], "paper=x: unknown claim 'x'"),
    ],
)
def test_a_mistake_names_its_key_before_anything_is_written(words, message, tmp_path, monkeypatch):
    """None of these may hang, and a layer's message names the setting that it came from."""
    monkeypatch.chdir(tmp_path)
    line = mistake(realnvp_cifar10.main, *override([*TINY, "run_dir=run"], words))
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_counts_of_layers_have_bounds(tmp_path):
    for word in ("flow.depth=1e7", "flow.n_levels=1e18"):
        words = override(small_words("glow_photos"), [word, f"run_dir={tmp_path / 'run'}"])
        assert "is out of range: give a whole number from 1 to" in mistake(glow_photos.main, *words)


@pytest.mark.parametrize("devices", ["-1", "0,1", "[0,1]", "0,", "[1]"])
def test_gpus_are_given_as_lightning_takes_them(devices, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    words = ["trainer.accelerator=gpu", "trainer.precision=32-true"]
    config = load(*words, f"trainer.devices={devices}", folder=tmp_path / "run")
    numbers = {"-1": -1, "0,1": [0, 1], "[0,1]": [0, 1], "0,": [0], "[1]": [1]}[devices]
    assert experiment.trainer_settings(config)["devices"] == numbers
    with pytest.raises(ConfigError, match=r"=\[0, 2\], but there are 2 GPUs here: .* from 0 to 1"):
        load(*words, "trainer.devices=0,2", folder=tmp_path / "run")


def test_a_number_of_a_row_that_no_computer_holds_is_one_line():
    line = mistake(lambda words: grid.main(words), "configs/sweeps/x.yaml", "9" * 5000)
    assert "for one of its rows a number from 0" in line


def test_help_of_the_rows_of_a_grid(capsys):
    grid.main(["--help"])
    assert "python -m reproduce.grid" in capsys.readouterr().out


def test_a_checkpoint_has_to_have_room(monkeypatch, tmp_path):
    """Weights, two moments of each and, where they are averaged, the averages."""
    usage = SimpleNamespace(total=1000, free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    words = [*TINY, f"run_dir={tmp_path / 'run'}", "trainer.max_steps=2"]
    line = mistake(realnvp_cifar10.main, *words)
    assert line.startswith(f"{tmp_path} has 0.0 MB left, and a checkpoint of this run takes about")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rank", "total"), [(1, 1000), (0, 0)])
def test_the_folder_is_checked_by_rank_0_where_its_size_is_known(
    rank, total, monkeypatch, tmp_path
):
    """Another rank writes nothing there, and its refusal would be printed by nobody."""
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    usage = SimpleNamespace(total=total, free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    module = SimpleNamespace(state_dict=dict, trained=torch.nn.Linear(1, 1))
    config = OmegaConf.create({"run_dir": str(tmp_path / "run"), "ema": {"decay": None}})
    readiness.check_folder(config, module)


@pytest.mark.parametrize(("decay", "averages"), [("null", 0), ("0.9", 1)])
def test_the_size_of_a_checkpoint_is_foreseen(tmp_path, decay, averages):
    folder = tmp_path / "run"
    words = [*TINY, f"run_dir={folder}", "trainer.max_steps=2", f"ema.decay={decay}"]
    realnvp_cifar10.main(words)
    config = OmegaConf.load(folder / "config.yaml")
    flow = realnvp_cifar10.make_flow(config, (3, 8, 8))
    data = SimpleNamespace(dequantizer=None, n_bits=None, shape=(3, 8, 8))
    foreseen = readiness.checkpoint_bytes(config, DensityModule.of(config, flow, data))
    actual = (folder / "checkpoints" / "step-00000002.ckpt").stat().st_size
    assert foreseen < actual < 8 * foreseen  # a small model's file is mostly names
    weights = sum(value.nbytes for value in flow.state_dict().values())
    assert foreseen >= (3 + averages) * 0.9 * weights


def test_a_folder_that_cannot_hold_a_run_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").write_text("")
    for folder, path in (("file", "file"), ("file/run", "file"), ("run", "run/samples")):
        line = mistake(realnvp_cifar10.main, *TINY, f"run_dir={tmp_path / folder}")
        assert line.startswith(f"{tmp_path / path} is no folder that this user can write: give")


class NeedsWeights(L.Callback):
    """A metric whose network has to be fetched."""

    def prepare_test(self):
        raise OSError("the weights of this metric are not here: fetch them with make weights")


def test_what_a_metric_needs_is_looked_at_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(
        realnvp_cifar10,
        "make_trainer",
        lambda config, module: experiment.make_trainer(config, module, NeedsWeights()),
    )
    folder = tmp_path / "run"
    words = [*TINY, f"run_dir={folder}", "trainer.max_steps=2"]
    assert "fetch them with make weights" in mistake(realnvp_cifar10.main, *words)
    assert not (folder / "curve.csv").exists()


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def test_a_result_that_is_not_finite_is_null_and_no_success(tmp_path, monkeypatch):
    evaluate = DensityModule.evaluate

    def not_finite(self, *inputs):
        log_prob, more = evaluate(self, *inputs)
        return log_prob * math.nan, more

    monkeypatch.setattr(DensityModule, "evaluate", not_finite)
    folder = tmp_path / "run"
    line = mistake(realnvp_cifar10.main, *TINY, f"run_dir={folder}", "trainer.max_steps=3")
    assert "test/bpd" in line
    assert "not finite, and null in result.json. Lower optim.lr" in line
    result = json.loads((folder / "result.json").read_text(), parse_constant=no_constant)
    assert result["metrics"]["test/bpd"] is None
    assert result["metrics"]["samples/finite_T0.7"] == 1.0


def test_what_does_not_fit_into_memory_is_one_line():
    @command
    def main(argv):
        if argv:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        torch.empty(2**50)

    assert mistake(main).startswith("not enough memory: give a smaller model or data.batch_size")
    assert "20.00 GiB" in mistake(main, "cuda")


# ---------------------------------------------------------------------- wrong values

SMALL = {
    "realnvp": ["flow.hidden_channels=4", "flow.n_blocks=1"],
    "glow": ["flow.hidden_channels=4", "flow.depth=1"],
    "moons": ["flow.hidden_channels=4", "flow.n_couplings=1"],
    "srflow": ["flow.hidden_channels=4", "flow.depth=1", "flow.encoder_channels=4"],
    "rrdb": ["flow.channels=4", "flow.n_blocks=1"],
}
FEW_CROPS = ["data.crop=32", "data.epoch_images=16", "data.batch_size=4"]
FEW = ["data.size=8", "data.n_train=64", "data.n_val=16", "data.n_test=16", "data.batch_size=16"]
TEXTS = [
    *("", " ", "null", "None", "~", "nan", "inf", "-inf", "-1", "0", "1", "2", "1.5", "-0.5"),
    *("1e-3", "1e30", "-1e30", "1e400", "99999999999999999999", "1_000", "0x10", "010", "1:30"),
    *("1:2:3:4:5", "10:00:00:00", "00:00:00:00", "true", "false", "True", "yes", "off", "abc"),
    *("auto", "best", "last", "adam", "cosine", "affine", "16", "16-true", "bf16-true", "64-true"),
    *("transformer-engine", "tpu", "mps", "gpu", "ddp_spawn", "fsdp", "wandb", "csv", "[]", "[1]"),
    *("[a,b]", "[nan]", "[-1]", "[0.5, 0.9]", "[1,2,3]", "[[1]]", "[", "]", "{}", "{a: 1}", "{"),
    *("'", '"x', "#", "@", "${seed}", "${", "???", "a" * 300, "é", "٣", "\u200b", "\n", "a\tb"),
    *("/", "..", "/dev/null", "--", "-", "=", "a=b", "*", "%s", "{}{}"),
]
LARGE = ["100000", "1e9", "9007199254740993"]  # for what is not built by itself
FOREIGN = ["gradient_clip_val", "lr", "epochs", "gpus", "trainer.gpus", "x", "flow", "optim", "a.b"]


def small_words(recipe):
    """The settings that make a recipe quick to build."""
    if recipe == "realnvp_moons":
        return SMALL["moons"]
    kind = recipe.partition("_")[0]
    few = FEW_CROPS if kind in ("srflow", "rrdb") else FEW
    words = ["preset=demo", *few, *SMALL.get(kind, [])]
    if recipe == "glow_cifar10_conditional":
        words.append("flow.n_classes=7")
    return words


def keys_of(recipe):
    sections = OmegaConf.to_container(compose(recipe, small_words(recipe)))
    keys = []
    for section, part in sections.items():
        keys += [f"{section}.{key}" for key in part] if isinstance(part, dict) else [section]
    return keys


KEYS = {recipe: keys_of(recipe) for recipe in RECIPES}


@functools.cache
def schema_of(recipe):
    schema = Schema(recipe)
    schema.use_data(compose(recipe, small_words(recipe)).data.name)
    return schema


@functools.cache
def accepted(recipe, key):
    """The texts that a key may have by its kind alone: some are refused where it is used."""
    texts = TEXTS if key.startswith("flow.") else [*TEXTS, *LARGE]
    return [text for text in texts if fits(schema_of(recipe).kind(key), text)] or ["null"]


def fits(kind, text):
    try:
        kind.read(text)
    except WrongValue:
        return False
    return True


@st.composite
def wrong_settings(draw):
    """A recipe and one to three settings: some wrong for their key, some out of its range."""
    recipe = draw(st.sampled_from(RECIPES))
    texts = {}
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.integers(0, 3)):
            key = draw(st.sampled_from(KEYS[recipe]))
            texts[key] = draw(st.sampled_from(accepted(recipe, key)))
        else:
            key = draw(st.sampled_from([*KEYS[recipe], *FOREIGN]))
            texts[key] = draw(st.sampled_from(TEXTS))
    return recipe, [f"{key}={text}" for key, text in texts.items()]


@command
def build(recipe, words, folder):
    """All that a script does before it trains, but for the run folder."""
    config = load(*words, name=recipe)
    script = import_module(f"reproduce.{recipe}")
    data = experiment_data(config)
    flow = script.make_flow(config, data.shape)
    module = constructors(recipe)["optim"].of(config, flow, data)
    module.check_data(data)
    callbacks = experiment.make_callbacks(config, module)
    readiness.check_folder(config, module)
    L.Trainer(
        **experiment.trainer_settings(config),
        callbacks=callbacks,
        logger=False,
        default_root_dir=folder,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        enable_model_summary=False,
    )


def experiment_data(config):
    from datamodules import make_data

    return make_data(seed=config.seed, **config.data)


@pytest.fixture(scope="module")
def outcomes():
    """What became of the settings that were drawn: built, or the line that refused them."""
    return {"built": 0, "refused": 0}


@settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(drawn=wrong_settings())
def check_drawn(outcomes, folder, drawn):
    recipe, words = drawn
    given_words = override([*small_words(recipe), f"run_dir={folder}"], words)
    try:
        build(recipe, given_words, folder)
    except SystemExit as stop:
        line = stop.code
        assert isinstance(line, str), f"exit code {line}: {given_words}"
        assert line.startswith("error: "), line
        assert "\n" not in line, line
        assert 20 < len(line) < 1000, line
        outcomes["refused"] += 1
    else:
        outcomes["built"] += 1


def test_300_wrong_settings_are_one_line_or_a_run_that_could_start(outcomes, tmp_path, monkeypatch):
    """They are drawn for every key of every recipe. No other error may come of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    # Reading the papers' tables would take most of the time.
    monkeypatch.setattr(results, "load_claim", functools.cache(results.load_claim))
    monkeypatch.setattr("reproduce.provenance.git_state", lambda: (None, False))
    check_drawn(outcomes, tmp_path / "run")
    assert outcomes["refused"] > 100
    assert outcomes["built"] > 50


FIXED = [
    ("realnvp_cifar10", "optim.clip_norm=nan"),
    ("realnvp_cifar10", "flow.alpha=abc"),
    ("realnvp_cifar10", "data.micro_batch=abc"),
    ("realnvp_cifar10", "trainer.max_time=1:2:3:4:5"),
    ("realnvp_cifar10", "optim.lr={}"),
    ("realnvp_cifar10", "optim.betas={}"),
    ("glow_cifar10", "samples.temperatures={}"),
    ("glow_cifar10", "data.size=0"),
    ("glow_cifar10", "trainer.precision=transformer-engine"),
    ("glow_cifar10", "trainer.accelerator=tpu"),
    ("glow_cifar10", "trainer.strategy=ddp_spawn"),
    ("glow_cifar10", f"logger.project={'a' * 300}"),
    ("glow_photos", "data.size=100000"),
    ("glow_photos", "trainer.devices=100000"),
    ("glow_photos", "trainer.num_nodes=2"),
    ("glow_photos", "seed=1:30"),
    ("realnvp_moons", "flow.hidden_channels=0"),
    ("realnvp_moons", "data.n_val=-1"),
    ("realnvp_moons", "data.n_test=0"),
    ("realnvp_moons", "optim={lr: 0.1}"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "word"), FIXED, ids=lambda part: part[:40])
def test_a_wrong_setting_ends_a_real_command_with_one_line(recipe, word, tmp_path):
    words = [*small_words(recipe), "logger.name=csv", "trainer.max_steps=2"]
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "reproduce" / f"{recipe}.py"),
            *override([*words, f"run_dir={tmp_path / 'run'}"], [word]),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert word.partition("=")[0].partition(".")[0] in errors[0]
    assert not (tmp_path / "run" / "curve.csv").exists()
