"""Recipes: each one composes and binds to its constructors, and each mistake is one line."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import lightning.pytorch as L
import pytest
import yaml
from omegaconf import OmegaConf

import results
from datamodules import DATA
from flows.base import FlowModel
from reproduce import config as config_module
from reproduce import experiment
from reproduce.command import command
from reproduce.config import CONFIGS, ConfigError, arguments, compose, describe, presets
from reproduce.experiment import papers_of
from reproduce.schema import Schema

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "base")
VARIANTS = [(recipe, preset) for recipe in RECIPES for preset in (None, *presets(recipe))]
CIFAR = "realnvp_cifar10"


def composed(recipe, preset=None):
    return compose(recipe, [] if preset is None else [f"preset={preset}"])


def mistake(*given, recipe=CIFAR):
    """The one line that a command line is answered with."""
    with pytest.raises(ConfigError) as error:
        compose(recipe, list(given))
    message = str(error.value)
    assert "\n" not in message
    assert message.strip()
    return message


def flat(section, prefix=""):
    """Dotted key -> value; lists are values."""
    if not isinstance(section, dict):
        return {prefix[:-1]: section}
    return {
        k: v for key, value in section.items() for k, v in flat(value, f"{prefix}{key}.").items()
    }


def leaves(config):
    return flat(OmegaConf.to_container(config))


# ---------------------------------------------------------------------- recipes


def test_there_are_recipes():
    assert {"realnvp_cifar10", "realnvp_moons"} <= set(RECIPES)
    assert {(CIFAR, None), (CIFAR, "demo"), (CIFAR, "cpu"), (CIFAR, "gpu")} <= set(VARIANTS)


@pytest.mark.parametrize(("recipe", "preset"), VARIANTS)
def test_every_recipe_composes(recipe, preset):
    config = composed(recipe, preset)
    assert (config.experiment, config.preset) == (recipe, preset)
    assert "presets" not in config
    assert "bases" not in config
    assert config.trainer.max_steps > 0 or config.trainer.max_epochs
    assert (
        config.optim.warmup_steps + config.optim.cooldown_steps <= config.trainer.max_steps
    )  # all of the schedule
    if config.trainer.max_steps > 0:
        assert config.trainer.max_steps % config.trainer.val_check_interval == 0


def constructors(recipe):
    """The flow and module classes that a recipe's script imports."""
    script = import_module(f"reproduce.{recipe}")
    classes = [v for v in vars(script).values() if isinstance(v, type)]
    [flow] = [c for c in classes if issubclass(c, FlowModel)]
    [module] = [c for c in classes if issubclass(c, L.LightningModule)]
    return script, flow, module


@pytest.mark.parametrize(("recipe", "preset"), VARIANTS)
def test_sections_bind_to_their_constructors(recipe, preset, monkeypatch):
    """Every section of a recipe fits the signature of the constructor that it goes to.

    Nothing is built. A key too many, or one too few, is a TypeError that names it.
    """
    config = composed(recipe, preset)
    script, flow, module = constructors(recipe)
    bound = []
    data = dict(config.data)
    inspect.signature(DATA[data.pop("name")]).bind(seed=config.seed, **data)
    monkeypatch.setattr(
        script, flow.__name__, lambda *a, **k: bound.append(inspect.signature(flow).bind(*a, **k))
    )
    script.make_flow(config, (3, 32, 32))
    assert [b.arguments["shape"] for b in bound] == [(3, 32, 32)]
    assert config.flow.items() <= bound[0].arguments.items()
    inspect.signature(module).bind(None, None, None, config.seed, **config.optim, **config.eval)
    trainer = {
        k: v for k, v in config.trainer.items() if k not in ("compile", "cuda_graph", "recompute")
    }  # ours
    inspect.signature(L.Trainer).bind(**trainer)


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_string_names_an_experiment(recipe):
    script, *_ = constructors(recipe)
    assert Path(script.__file__) == ROOT / "reproduce" / f"{recipe}.py"
    assert callable(script.main)
    text = (CONFIGS / f"{recipe}.yaml").read_text()
    paper = compose(recipe, []).paper
    if paper is None:
        assert re.search(r"^paper: null +# \w+", text, re.MULTILINE), (
            "paper: null needs a comment with its reason"
        )
    else:
        for claim_id in [paper] if isinstance(paper, str) else paper:
            claim = results.load_claim(claim_id)
            assert claim["id"] == claim_id
            assert isinstance(claim["value"], float | int)


@pytest.mark.parametrize(
    ("words", "claims"),
    [
        ([], ["realnvp.cifar10"]),
        (["paper=null"], []),
        (["paper=[]"], []),
        (["paper=glow.cifar10"], ["glow.cifar10"]),
        (["paper=[glow.cifar10]"], ["glow.cifar10"]),
        (["paper=[glow.cifar10,glow.cifar10]"], ["glow.cifar10"]),
    ],
)
def test_a_run_stands_beside_none_one_or_several_claims(words, claims):
    papers = papers_of(compose(CIFAR, words))
    assert [paper["claim"] for paper in papers] == claims
    for paper in papers:
        claim = results.load_claim(paper["claim"])
        assert {
            key: claim[key] for key in ("metric", "value", "direction")
        }.items() <= paper.items()
        assert (paper["decimals"], paper["comparable"]) == (2, True)
    assert not any(
        paper["comparable"] for paper in papers_of(compose(CIFAR, [*words, "data.name=photos"]))
    )


def test_several_claims_come_in_their_order_and_each_is_comparable_by_itself(monkeypatch):
    claim = results.load_claim("realnvp.cifar10")
    claims = {
        "f.psnr": claim
        | {"id": "f.psnr", "metric": "test/psnr", "direction": "higher", "value": 27.75},
        "f.lpips": claim
        | {"id": "f.lpips", "metric": "test/lpips", "decimals": 3, "data": "photos"},
    }
    monkeypatch.setattr(results, "load_claim", claims.__getitem__)
    psnr, lpips = papers_of(compose(CIFAR, ["paper=[f.psnr,f.lpips]"]))
    assert psnr == {
        "claim": "f.psnr",
        "metric": "test/psnr",
        "value": 27.75,
        "decimals": 2,
        "direction": "higher",
        "comparable": True,
    }
    assert (lpips["claim"], lpips["decimals"], lpips["comparable"]) == ("f.lpips", 3, False)


def test_two_claims_on_one_metric_and_unknown_ones_are_one_line():
    with pytest.raises(
        ConfigError, match=r"realnvp\.cifar10 and glow\.cifar10 are both claims on bpd: give one"
    ):
        papers_of(compose(CIFAR, ["paper=[realnvp.cifar10,glow.cifar10]"]))
    with pytest.raises(ConfigError, match=r"unknown claim 'glow\.cifar': did you mean"):
        papers_of(compose(CIFAR, ["paper=[realnvp.cifar10,glow.cifar]"]))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null", None),
        ("realnvp.cifar10", "realnvp.cifar10"),
        ("[glow.cifar10]", ["glow.cifar10"]),
    ],
)
def test_one_claim_may_replace_several_and_the_other_way_round(text, value):
    section = OmegaConf.create({"paper": ["realnvp.cifar10", "glow.cifar10"]})
    given = config_module.parse([f"paper={text}"])
    assert config_module.merge(section, given, Schema("none")).paper == value


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_open_with_a_comment_and_their_bases(recipe):
    text = (CONFIGS / f"{recipe}.yaml").read_text()
    assert text.startswith("# ")
    line = next(line for line in text.splitlines() if not line.startswith("#"))
    assert re.fullmatch(r"bases: \[(base\.yaml, data/\w+|\w+)\.yaml\]", line)
    assert line[len("bases: [") : -len(".yaml]")] in {
        *RECIPES,
        *(f"base.yaml, data/{name}" for name in DATA),
    }
    assert re.search(r"^paper: ", text, re.MULTILINE), (
        "a claim is never taken over from an extended recipe"
    )


GLOWS = {  # recipe -> what it says that glow_cifar10 does not
    "glow_cifar10_additive5bit": {
        **{"paper": "glow.cifar10_additive5bit", "flow.coupling": "additive", "data.n_bits": 5},
    },
    "glow_cifar10_conditional": {
        **{
            "paper": None,
            "flow.coupling": "additive",
            "flow.n_classes": 10,
            "data.n_bits": 5,
            "data.labels": True,
        },
        "optim.class_weight": 0.01,
    },
    "glow_cifar10_modern": {
        **{
            "paper": None,
            "flow.alpha": 0.05,
            "flow.min_scale": 0.5,
            "data.hflip": True,
            "data.shift": 0.0,
        },
        **{
            "optim.betas": [0.9, 0.99],
            "optim.warmup_steps": 1000,
            "optim.cooldown_steps": 29300,
            "ema.decay": 0.999,
        },
    },
}


@pytest.mark.parametrize("recipe", GLOWS)
def test_a_recipe_that_extends_another_differs_from_it_in_what_it_says(recipe):
    plain = leaves(compose("glow_cifar10", []))
    extended = leaves(compose(recipe, []))
    assert plain.keys() <= extended.keys()
    different = {
        key: value for key, value in extended.items() if key not in plain or plain[key] != value
    }
    assert different == {"experiment": recipe, **GLOWS[recipe]}
    assert presets(recipe) == presets("glow_cifar10")
    small = compose(recipe, ["preset=cpu"])
    assert (small.flow.depth, small.data.batch_size, small.optim.warmup_steps) == (
        8,
        32,
        500,
    )  # glow_cifar10's preset


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "presets").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shared_presets_hold_no_model(path):
    assert set(yaml.safe_load(path.read_text())) <= {"trainer", "data", "logger", "quality"}


def test_every_data_file_is_a_datamodule():
    files = {
        path.stem: yaml.safe_load(path.read_text()) for path in (CONFIGS / "data").glob("*.yaml")
    }
    assert set(files) == set(DATA)
    for name, content in files.items():
        assert list(content) == ["data"]
        assert content["data"].pop("name") == name
        inspect.signature(DATA[name]).bind(seed=0, **content["data"])


# ---------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("optim.lr=5e-4", "optim.lr", 5e-4),
        ("optim.lr=1e-4", "optim.lr", 1e-4),  # YAML 1.1 would read a string
        ("optim.lr=1", "optim.lr", 1.0),
        ("optim.clip_norm=3", "optim.clip_norm", 3.0),
        ("trainer.max_steps=10", "trainer.max_steps", 10),
        ("data.hflip=false", "data.hflip", False),
        ("data.root=/data/a b", "data.root", "/data/a b"),
        ("optim.name=adamax", "optim.name", "adamax"),
        ("trainer.devices=2", "trainer.devices", 2),  # auto takes an int
        ("trainer.devices=auto", "trainer.devices", "auto"),
        ("trainer.precision=32-true", "trainer.precision", "32-true"),  # or a str
        ("trainer.limit_test_batches=5", "trainer.limit_test_batches", 5),  # null takes anything
        ("trainer.limit_test_batches=0.5", "trainer.limit_test_batches", 0.5),
        ("trainer.max_time=00:01:00:00", "trainer.max_time", "00:01:00:00"),
        ("ema.decay=0.999", "ema.decay", 0.999),
        ("run_dir=outputs/a=b", "run_dir", "outputs/a=b"),
        ("resume=auto", "resume", "auto"),
        ("optim.clip_norm=null", "optim.clip_norm", None),  # what is on can be switched off
        ("paper=null", "paper", None),
        ("paper=glow.cifar10", "paper", "glow.cifar10"),
        ("paper=[glow.cifar10]", "paper", ["glow.cifar10"]),
        ("paper=[glow.cifar10,realnvp.cifar10]", "paper", ["glow.cifar10", "realnvp.cifar10"]),
        ("optim.betas=[0.8,0.95]", "optim.betas", [0.8, 0.95]),
        ("samples.temperatures=[0.7]", "samples.temperatures", [0.7]),
    ],
)
def test_overrides(argument, key, value):
    before = leaves(compose(CIFAR, []))
    after = leaves(compose(CIFAR, [argument]))
    assert after[key] == value
    assert type(after[key]) is type(value)
    assert {k for k in before if before[k] != after[k]} <= {key}
    assert before.keys() == after.keys()


def test_many_overrides():
    config = compose(CIFAR, ["optim.lr=2", "seed=3", "optim.betas=[0.5,0.6]"])
    assert (config.optim.lr, config.seed, config.optim.betas) == (2.0, 3, [0.5, 0.6])


@pytest.mark.parametrize("words", [["optim.lr=1", "seed=3", "optim.lr=2"], ["seed=1", "seed=1"]])
def test_a_key_that_is_given_twice_is_refused(words):
    key = words[0].partition("=")[0]
    assert f"{key} is given twice" in mistake(*words)


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("optim.lrr=1e-3", "optim.lr"),
        ("OPTIM.LR=1e-3", "optim.lr"),
        ("optm.lr=1e-3", "optim.lr"),
        ("lr=1e-3", "optim.lr"),
        ("flow.hidden_chanels=8", "flow.hidden_channels"),
        ("data.batchsize=8", "data.batch_size"),
        ("sed=1", "seed"),
        ("trainer.maxsteps=8", "trainer.max_steps"),
        ("optim.lr.x=1", "optim.lr"),
    ],
)
def test_a_typo_names_the_nearest_key(argument, nearest):
    message = mistake(argument)
    assert argument.split("=")[0] in message
    assert f"did you mean {nearest}?" in message


def test_a_key_that_is_like_no_known_key():
    message = mistake("zzzzzz=1")
    assert "zzzzzz is not a known key" in message
    assert "did you mean" not in message


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("trainer.max_steps=abc", "int"),
        ("trainer.max_steps=1.5", "int"),
        ("trainer.max_steps=true", "int"),
        ("seed=1.5", "int"),
        ("optim.lr=fast", "float"),
        ("optim.lr=true", "float"),
        ("optim.lr=[0.1]", "float"),
        ("optim.clip_norm=big", "float"),
        ("data.hflip=3", "bool"),
        ("data.hflip=maybe", "bool"),
        ("optim.betas=0.9", "list"),
        ("paper=3", "list, each a name"),
        ("paper=[realnvp.cifar10,3]", "list, each a name"),
        ("paper=[[realnvp.cifar10]]", "list, each a name"),
        ("trainer.devices={0: 1}", "int from 1, auto"),
    ],
)
def test_a_wrong_type(argument, wanted):
    message = mistake(argument)
    assert argument.split("=")[0] in message
    assert "wrong type" in message
    assert "Config" not in message  # a name of OmegaConf's
    assert re.search(rf"give an? .*\b{wanted}\b", message)


@pytest.mark.parametrize("section", ["data", "flow", "optim", "trainer", "samples"])
@pytest.mark.parametrize("value", ["3", "null", "", "[1]"])
def test_a_section_is_no_value(section, value):
    message = mistake(f"{section}={value}")
    assert f"{section} is a section" in message
    assert next(iter(compose(CIFAR, [])[section])) in message  # names the keys that there are


@pytest.mark.parametrize(
    "argument", ["foo", "--foo", "=3", "-x=3", "optim.lr", "optim.betas[0]=0.8", ""]
)
def test_an_argument_without_key_and_value(argument):
    assert f"'{argument}' is not of the form key=value" in mistake("seed=1", argument)


@pytest.mark.parametrize("argument", ["optim.betas=[0.9", "optim.betas={a", "run_dir={x"])
def test_an_unclosed_list_or_section_is_quoted(argument):
    assert argument in mistake(argument)


@pytest.mark.parametrize("path", ["'x", "@", "a: b", "#1", "~", "yes"])
def test_a_path_stays_as_it_is_written(path):
    assert compose(CIFAR, [f"run_dir={path}"]).run_dir == path


@pytest.mark.parametrize(
    "argument", ["run_dir=${oops}", "optim.lr=${seed", "optim.lr=???", "run_dir=???"]
)
def test_omegaconfs_own_syntax_in_a_value(argument):
    """Interpolations and missing values mean something to OmegaConf alone."""
    assert argument.split("=")[0] in mistake(argument)


@pytest.mark.parametrize(
    ("argument", "nearest", "choices"),
    [
        ("logger.name=wandbb", "wandb", "wandb, csv, none"),
        ("logger.name=nome", "none", "wandb, csv, none"),
        ("checkpoint.select=beest", "best", "best, last"),
        ("preset=cpuu", "cpu", "demo, cpu, gpu"),
        ("data.name=cifar", "cifar10", ", ".join(sorted(DATA))),
        ("data.name=photoss", "photos", ", ".join(sorted(DATA))),
    ],
)
def test_an_unknown_choice_names_the_nearest(argument, nearest, choices):
    message = mistake(argument)
    assert f"{argument} is not known (did you mean {nearest}?)" in message
    assert message.endswith(f"give one of {choices}")


def test_a_key_with_a_single_choice():
    message = mistake("resume=autoo")
    assert message == "resume=autoo is not known (did you mean auto?): give auto, or null"


@pytest.mark.parametrize(
    "argument", ["preset=1", "preset=[a]", "data.name=3", "data.name=[a]", "resume=yes"]
)
def test_a_choice_of_another_type(argument):
    assert "is not known" in mistake(argument)


@pytest.mark.parametrize("argument", ["data.name=", "data.name=null"])
def test_a_data_set_is_needed(argument):
    assert "data.name" in mistake(argument)


def test_a_recipe_without_presets():
    without = [recipe for recipe in RECIPES if not presets(recipe)]
    assert without
    for recipe in without:
        assert f"preset=cpu is not known: {recipe} has none" in mistake("preset=cpu", recipe=recipe)


# ---------------------------------------------------------------------- other data, presets


@pytest.mark.parametrize("order", [1, -1])
def test_other_data_bring_their_whole_section(order):
    config = compose(CIFAR, ["data.name=photos", "data.size=64"][::order])
    photos = yaml.safe_load((CONFIGS / "data" / "photos.yaml").read_text())["data"]
    assert OmegaConf.to_container(config.data) == photos | {"size": 64}
    assert config.flow == compose(CIFAR, []).flow
    assert "data.root" in mistake("data.name=photos", "data.root=elsewhere")


def test_the_same_data_change_nothing():
    assert compose(CIFAR, ["data.name=cifar10"]) == compose(CIFAR, [])


@pytest.mark.parametrize("preset", presets(CIFAR))
def test_other_data_under_a_preset(preset):
    config = compose(CIFAR, ["data.name=photos", f"preset={preset}"])
    shared = yaml.safe_load((CONFIGS / "presets" / f"{preset}.yaml").read_text())
    own = yaml.safe_load((CONFIGS / f"{CIFAR}.yaml").read_text())["presets"][preset]
    photos = yaml.safe_load((CONFIGS / "data" / "photos.yaml").read_text())["data"]
    assert OmegaConf.to_container(config.data) == photos | shared.get("data", {}) | own.get(
        "data", {}
    )
    assert config.flow == composed(CIFAR, preset).flow
    assert config.trainer == composed(CIFAR, preset).trainer


def test_the_demo_brings_its_data():
    config = composed(CIFAR, "demo")
    assert config.data.name == "photos"
    assert "root" not in config.data
    assert compose(CIFAR, ["preset=demo", "data.size=64"]).data.size == 64


def test_the_demo_on_its_recipes_own_data():
    """The demo's data have a key (n_test) that CIFAR-10 has not: they are left out."""
    config = compose(CIFAR, ["preset=demo", "data.name=cifar10"])
    assert config.data == compose(CIFAR, []).data
    assert config.trainer.max_steps == 200


def test_the_command_line_is_over_the_presets():
    config = compose(
        CIFAR, ["preset=gpu", "optim.lr=1e-2", "data.batch_size=128", "trainer.accelerator=cpu"]
    )
    assert (config.optim.lr, config.data.batch_size, config.trainer.accelerator) == (
        1e-2,
        128,
        "cpu",
    )
    assert (config.optim.warmup_steps, config.data.num_workers) == (
        500,
        4,
    )  # what else the preset brings


def test_auto_stays_possible_under_a_preset():
    """cpu.yaml sets devices: 1 where base.yaml has auto, which takes an int or a str."""
    assert compose(CIFAR, ["preset=cpu", "trainer.devices=auto"]).trainer.devices == "auto"


@pytest.fixture
def write(tmp_path):
    """A function that writes a file of the small configs/ folder."""

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(inspect.cleandoc(text))

    return write


@pytest.fixture
def house(tmp_path, write, monkeypatch):
    """A small configs/ folder: two bases, a recipe with two presets, and two data sets."""
    tail = "logger: {name: csv}\ncheckpoint: {select: last}\nresume: null"
    write("one.yaml", f"only_one: 1\na: 1\nb: 1\nc: 1\nd: 1\ne: 1\n{tail}")
    write("two.yaml", "a: 2\nb: 2\nc: 2\nd: 2\ne: 2\ndata: {name: x, n: 2, m: 2}")
    write(
        "flow_x.yaml",
        """
        bases: [one.yaml, two.yaml]
        b: 3
        c: 3
        d: 3
        e: 3
        data: {m: 3}
        presets:
          small: {d: 5, e: 5}
          other: {data: {name: y}}
        """,
    )
    write("presets/small.yaml", "c: 4\nd: 4\ne: 4\ndata: {n: 4}")
    write("presets/other.yaml", "c: 4")
    write("data/x.yaml", "data: {name: x, n: 1, m: 1}")
    write("data/y.yaml", "data: {name: y, n: 8, only_y: 8}")
    monkeypatch.setattr(config_module, "CONFIGS", tmp_path)
    return lambda *given: leaves(compose("flow_x", list(given)))


def test_order_of_merging(house):
    """Bases, the recipe, the shared part of a preset, the recipe's part of it, the command line."""
    order = {"only_one": 1, "a": 2, "b": 3, "c": 3, "d": 3, "e": 3, "data.n": 2, "data.m": 3}
    assert house().items() >= order.items()
    assert house("preset=small").items() >= (order | {"c": 4, "d": 5, "e": 5, "data.n": 4}).items()
    assert (
        house("e=6", "preset=small").items()
        >= (order | {"c": 4, "d": 5, "e": 6, "data.n": 4}).items()
    )
    assert presets("flow_x") == ["small", "other"]


def test_order_of_merging_with_other_data(house):
    def data(*given):
        return {k: v for k, v in house(*given).items() if k.startswith("data.")}

    other = {
        "data.name": "y",
        "data.n": 8,
        "data.only_y": 8,
    }  # nothing of the recipe's own data: {m: 3}
    assert data("data.name=y") == other
    assert data("data.name=y", "preset=small") == other | {"data.n": 4}
    assert data("data.name=y", "preset=small", "data.n=9") == other | {"data.n": 9}
    assert data("preset=other") == other
    assert data("preset=other", "data.name=x") == {"data.name": "x", "data.n": 2, "data.m": 3}


# ---------------------------------------------------------------------- recipes that extend


@pytest.fixture
def extending(house, write):
    """A recipe that extends flow_x of `house`: (leaves of the composed config, given arguments)."""
    write(
        "one.yaml",
        """
        paper: null
        a: 1
        b: 1
        c: 1
        d: 1
        e: 1
        list: [1, 2, 3]
        speed: 0.5
        free: null
        section: {k: 1}
        logger: {name: csv}
        checkpoint: {select: last}
        resume: null
        """,
    )
    write(
        "two.yaml",
        """
        bases: [one.yaml]
        a: 2
        free: 7
        data: {name: x, n: 2, m: 2}
        """,
    )
    write(
        "flow_x.yaml",
        """
        bases: [one.yaml, two.yaml]
        paper: x.row
        b: 3
        presets:
          small: {a: 5, b: 5, section: {k: 5}}
          other: {data: {name: y}}
        """,
    )
    write(
        "flow_z.yaml",
        """
        bases: [flow_x.yaml]
        paper: null
        list: [4]
        speed: 2.5
        free: null
        section: {k: 8}
        flow: {new: 9}
        presets:
          small: {b: 6}
          third: {a: 7}
        """,
    )
    write("presets/third.yaml", "b: 9")
    return lambda *given: leaves(compose("flow_z", list(given)))


def test_a_recipe_extends_a_recipe_with_its_bases_and_presets(extending):
    plain = {
        "paper": None,
        "a": 2,
        "b": 3,
        "list": [4],
        "speed": 2.5,
        "free": None,
        "section.k": 8,
        "flow.new": 9,
    }
    assert extending().items() >= plain.items()
    assert presets("flow_z") == ["small", "other", "third"]
    small = {
        "a": 5,
        "b": 6,
        "section.k": 5,
        "flow.new": 9,
    }  # flow_x's preset, and flow_z's part of it on top
    assert extending("preset=small").items() >= (plain | small | {"data.n": 4}).items()
    assert extending("preset=third").items() >= (plain | {"a": 7, "b": 9}).items()
    assert extending("preset=other")["data.only_y"] == 8
    assert extending("paper=x.row")["paper"] == "x.row"  # what is switched off can come back


def test_a_file_that_is_reached_twice_counts_once(house, write):
    """Where it was reached first: what stands between the two is not undone."""
    write("flow_a.yaml", "bases: [one.yaml, two.yaml]\na: 3")
    write("flow_b.yaml", "bases: [flow_a.yaml, one.yaml]\nb: 3")
    assert leaves(compose("flow_b", [])).items() >= {"a": 3, "b": 3, "c": 2, "only_one": 1}.items()


def test_a_base_may_bring_other_data(house, write):
    """The whole section of the data set, as data.name= on the command line does."""
    write("flow_b.yaml", "bases: [flow_x.yaml, data/y.yaml]\ndata: {n: 9}")
    assert OmegaConf.to_container(compose("flow_b", []).data) == {"name": "y", "n": 9, "only_y": 8}
    write("flow_c.yaml", "bases: [flow_x.yaml]\ndata: {name: y}")
    assert OmegaConf.to_container(compose("flow_c", []).data) == {"name": "y", "n": 8, "only_y": 8}


@pytest.mark.parametrize("claims", ["[x.one, x.two]", "x.two", "null"])
def test_a_paper_is_replaced_whatever_it_was(extending, write, claims):
    write("flow_w.yaml", f"bases: [flow_x.yaml]\npaper: {claims}")
    assert OmegaConf.to_container(compose("flow_w", []))["paper"] == yaml.safe_load(claims)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("b: null", "b=null has the wrong type: give an int, for example b=3"),
        ("speed: fast", "speed=fast has the wrong type: give a float, for example speed=0.5"),
        ("list: 3", "list=3 has the wrong type"),
        ("section: 3", "section is a section, not a value"),
        ("b: {c: 3}", "b is a value, not a section with b.c"),
        ("data: {name: z}", "data.name=z is not known"),
        ("paper: {x.one: 1}", "paper is a value, not a section with paper.x.one"),
        ("paper: {}", "paper={} has the wrong type: give a name, or a list, each a name, or null"),
        ("b: 1_0", "b=1_0 has the wrong type"),
        ("b: {}", "b={} has the wrong type"),
        ("b: 4\nb: 5", "b is given twice: give it once"),
        ("paper: 3", "paper=3 has the wrong type"),
        ("section: {kk: 3}", "section.kk is no key of its bases (did you mean section.k?)"),
        ("papr: x.row", "papr is no key of its bases (did you mean paper?)"),
        ("secton: {k: 3}", "secton.k is no key of its bases (did you mean section.k?)"),
        (
            "presets: {smal: {b: 3}}",
            "presets.smal has no file presets/smal.yaml (did you mean small?)",
        ),
        ("experiment: y", "experiment cannot be set in a file: it is the name of the recipe"),
        ("preset: small", "preset cannot be set in a file: it is given on the command line"),
        ("presets: 3", "presets are sections"),
        ("presets: {small: }", "presets are sections"),
        ("presets: {small: 3}", "presets are sections"),
        ("section: {<<: {k: 3}}", "section.<<.k is not a key: keys are letters, digits and _"),
        ("'a b': 3", "a b is not a key: keys are letters, digits and _"),
        ('b: "${section."', "flow_w.yaml has a wrong ${...}"),
    ],
)
def test_what_is_extended_keeps_its_types(extending, write, line, message):
    write("flow_w.yaml", f"bases: [flow_x.yaml]\n{line}")
    assert message in mistake(recipe="flow_w")
    if "data" not in line:
        assert "flow_w.yaml" in mistake(recipe="flow_w")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bases: [flow_w.yaml]", "flow_w.yaml extends itself: flow_w.yaml -> flow_w.yaml"),
        (
            "bases: [flow_v.yaml]",
            "flow_w.yaml extends itself: flow_w.yaml -> flow_v.yaml -> flow_w.yaml",
        ),
        ("bases: [flow_xx.yaml]", "flow_xx.yaml is missing: it is among the bases of flow_w.yaml"),
        ("bases: flow_x.yaml", "flow_w.yaml needs its bases as a list"),
        ("bases: null", "flow_w.yaml needs its bases as a list"),
        ("bases: [3]", "flow_w.yaml needs its bases as a list"),
        ("- 3", "flow_w.yaml needs its bases as a list"),
        ("bases: [", "cannot read"),
        ("a: 3", "flow_w.yaml has no data: add bases: [base.yaml, data/cifar10.yaml]"),
    ],
)
def test_bases_that_cannot_be_are_one_line(house, write, text, message):
    write("flow_w.yaml", text)
    write("flow_v.yaml", "bases: [flow_x.yaml, flow_w.yaml]")
    assert message in mistake(recipe="flow_w")


def test_a_recipe_may_refer_to_other_keys(extending, write):
    """Also to those of what it extends, which is not whole when the file is read."""
    write("flow_w.yaml", 'bases: [flow_x.yaml]\nb: "${section.k}"')
    assert compose("flow_w", ["section.k=21"]).b == 21
    write("flow_w.yaml", 'bases: [flow_x.yaml]\nb: "${sectoin.k}"')
    assert "b=${sectoin.k} of the recipe has no value" in mistake(recipe="flow_w")
    write("flow_w.yaml", 'bases: [flow_x.yaml]\nb: "${list}"')
    assert "b=[1, 2, 3] has the wrong type: give an int" in mistake(recipe="flow_w")


def test_a_mistake_in_a_preset_names_the_preset(extending, write):
    write("flow_w.yaml", "bases: [flow_x.yaml]\npresets: {small: {b: x, c: 1}}")
    assert mistake("preset=small", recipe="flow_w").startswith("preset=small: b=x has the wrong")
    write("flow_w.yaml", "bases: [flow_x.yaml]\npresets: {small: {sectoin: {k: 1}}}")
    message = mistake("preset=small", recipe="flow_w")
    assert message.startswith("preset=small: sectoin.k is not a known key (did you mean")
    write("presets/small.yaml", "- a")
    assert "small.yaml holds no sections" in mistake("preset=small", recipe="flow_w")


def test_a_recipe_without_the_shared_keys_is_one_line(house, write):
    """What every script reads is in base.yaml; the keys of a model are asked for by its script."""
    with pytest.raises(
        ConfigError, match=r"of flow_x has no seed, run_dir, init_from, paper, trainer, "
    ):
        experiment.load_config("flow_x.py", "", [])

    @command
    def main(argv):
        return compose("flow_x", []).flow

    with pytest.raises(SystemExit, match=r"error: the recipe does not fit its script: .*flow"):
        main([])


def test_a_script_without_a_recipe_is_one_line(house):
    assert "link.yaml is missing: a script needs a recipe of its name" in mistake(recipe="link")


def test_help_follows_bases_of_bases(house, write):
    """A base says what a key is, and a recipe where its value is from.

    The second no longer holds where another recipe replaces the value.
    """
    write(
        "one.yaml",
        """
        a: 1  # a key
        b: 1  # another key
        c: 1
        d: 1
        data: {name: x}
        logger: {name: csv}
        resume: null
        """,
    )
    write("two.yaml", "checkpoint: {select: last}\nd: 1  # of two")
    write("flow_x.yaml", "bases: [one.yaml, two.yaml]\na: 2\nb: 2  # from x\nc: 2  # from x")
    write("flow_z.yaml", "bases: [flow_x.yaml]\nb: 3\nd: 3  # from z")
    lines = describe("flow_z", "").splitlines()
    assert {"  a=2  # a key", "  b=3  # another key", "  c=2  # from x", "  d=3  # from z"} <= set(
        lines
    )
    write("flow_z.yaml", "bases: [flow_x.yaml]\nc: 3")
    assert "  c=3" in describe("flow_z", "").splitlines()


# ---------------------------------------------------------------------- help


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_lists_every_key_with_its_default(recipe):
    text = describe(recipe, "  What is reproduced.\n\npython reproduce/x.py\n")
    assert text.startswith("What is reproduced.\n\npython reproduce/x.py\n")
    assert f"presets: {', '.join(presets(recipe)) or 'none'}" in text.splitlines()
    found = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"  ([\w.]+)=(.*?)(?:  # .*)?", line):
            assert match[1] not in found
            found[match[1]] = match[2]
    plain = leaves(compose(recipe, []))
    del plain["experiment"]
    assert list(found) == list(plain)
    assert {k: yaml.safe_load(v) for k, v in found.items() if not isinstance(plain[k], float)} == {
        k: v for k, v in plain.items() if not isinstance(v, float)
    }
    assert compose(recipe, [f"{k}={v}" for k, v in found.items()]) == compose(
        recipe, []
    )  # as they are printed


def test_help_shows_the_comments():
    lines = describe(CIFAR, "").splitlines()
    assert "  seed=0  # of initialisation, order, flips and training noise" in lines
    assert "  data.n_val=5000  # of the 50,000 training images; 0 for a final run on all" in lines
    assert "  flow.hidden_channels=64  # section 4.1: 64 maps on the first scale" in lines
    assert (
        "  trainer.max_steps=195000  # ours: 250 passes over 50,000 images" in lines
    )  # the recipe's, not the base's
    assert "  optim.lr=0.001" in lines


def test_help_with_a_preset_shows_the_presets_values():
    """A comment that names the source of the recipe's value does not stand behind another one."""
    lines = describe(CIFAR, "", ["--help", "preset=cpu", "seed=3"]).splitlines()
    config = compose(CIFAR, ["preset=cpu"])
    assert "keys, with the value of preset=cpu:" in lines
    assert f"  flow.hidden_channels={config.flow.hidden_channels}" in lines
    assert config.flow.hidden_channels != 64
    assert "  trainer.val_check_interval=703  # steps between validations" in lines
    assert "  seed=0  # of initialisation, order, flips and training noise" in lines
    shown = [line.strip().partition("  # ")[0] for line in lines if line.startswith("  ")]
    assert compose(CIFAR, shown) == config


def test_help_with_other_data_shows_their_keys_and_comments():
    for words in (["preset=demo"], ["data.name=photos"]):
        lines = describe(CIFAR, "", words).splitlines()
        assert f"keys, with the value of {words[0]}:" in lines
        assert "  data.size=32  # of a crop, pixels" in lines
        n_val = compose(CIFAR, words).data.n_val
        assert f"  data.n_val={n_val}" in lines  # not: of the 50,000 training images
    with pytest.raises(ConfigError, match=r"preset=cpv is not known \(did you mean cpu\?\)"):
        describe(CIFAR, "", ["preset=cpv"])


def test_help_says_which_presets_switch_wandb_off():
    line = "cpu and demo switch W&B off: add logger.name=wandb to log there"
    for recipe in RECIPES:
        has_line = line in describe(recipe, "").splitlines()
        assert has_line == (set(presets(recipe)) == {"cpu", "demo", "gpu"})


def test_the_presets_are_those_that_readme_names():
    """README: every recipe of images has presets demo, cpu and gpu; `realnvp_moons` has none."""
    without = [recipe for recipe in RECIPES if not presets(recipe)]
    assert without == ["realnvp_moons"]
    assert "realnvp_moons` has none" in (CONFIGS.parent / "README.md").read_text(encoding="utf-8")
    for recipe in set(RECIPES) - set(without):
        assert set(presets(recipe)) == {"demo", "cpu", "gpu"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_has_every_comment_of_the_recipe(recipe):
    own = (CONFIGS / f"{recipe}.yaml").read_text().split("\npresets:")[0]
    comments = re.findall(r"^ *\w+: .*?# (.+)$", own, re.MULTILINE)
    text = describe(recipe, "")
    assert comments
    assert [c for c in comments if f"  # {c}" not in text] == []


def test_arguments_come_from_the_command_line_unless_given(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script", "seed=1"])
    assert arguments(None) == ["seed=1"]
    assert arguments([]) == []
    assert arguments(["seed=2"]) == ["seed=2"]


@pytest.mark.parametrize(
    "argument", ["seed=null", "optim.lr=null", "data.batch_size=", "optim.betas=[a,b]"]
)
def test_null_and_list_elements_have_types(argument):
    assert "wrong type" in mistake(argument)


def test_null_and_lists_of_ints_are_taken_where_the_base_has_them():
    assert compose(CIFAR, ["optim.clip_norm=null"]).optim.clip_norm is None
    assert compose(CIFAR, ["optim.betas=[0,0.99]"]).optim.betas == [0, 0.99]


# ---------------------------------------------------------------------- arguments


class Takes:
    def __init__(self, depth=1):
        self.depth = depth


def test_a_key_that_a_constructor_does_not_take_is_one_line_and_other_type_errors_are_not(
    monkeypatch,
):
    """A user's own recipe may have such a key, since `compose` knows no model."""
    with pytest.raises(
        SystemExit, match="error: Takes takes no 'depht': look for it in the recipe"
    ):
        command(lambda argv: Takes(depht=2))([])
    with pytest.raises(TypeError):
        command(lambda argv: len(3))([])
    monkeypatch.setenv("PAPERFLOWS_TRACEBACK", "1")
    with pytest.raises(TypeError, match="unexpected keyword argument 'depht'"):
        command(lambda argv: Takes(depht=2))([])
