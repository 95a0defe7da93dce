"""Sweep files: W&B's own schema takes them, and wandb's own agent starts them.

A preempted run of a sweep comes back as it was.
"""

import json
import os
import subprocess
import sys
import time
from importlib import import_module, metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
import yaml
from omegaconf import OmegaConf
from wandb_file import parts_of

from reproduce.config import CONFIGS, ConfigError, compose
from reproduce.grid import rows
from reproduce.grid import words as words_of_row
from reproduce.sweep import agent_arguments, in_sweep

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((CONFIGS / "sweeps").glob("*.yaml"))
QUICK = {
    "realnvp_cifar10_grid",
    "realnvp_moons",
    "realnvp_photos",
    "glow_cifar10_conditional",
}  # the others: slow
GRIDS = {"realnvp_cifar10_grid", "realnvp_cifar10_gpu"}
RUN = [
    pytest.param(path, marks=[] if path.stem in QUICK else pytest.mark.slow)
    for path in FILES
    # The first has a test of its own, and the second needs a GPU.
    if path.stem not in ("realnvp_cifar10", "realnvp_cifar10_gpu")
]
CIFAR = "realnvp_cifar10"
RUN_ID = "kd83hsl0"
OF_THE_RUN = {"run_dir", "resume", "overrides"}  # keys of a config that a resumed run may change
TWO_PHOTO_STEPS = [
    *("data.name=photos", "data.size=8", "data.n_train=256", "data.n_val=16", "data.n_test=16"),
    *("eval.bn_images=32", "samples.n=2", "trainer.val_check_interval=1", "trainer.max_steps=2"),
    "trainer.precision=32-true",
]
TWO_GLOW_STEPS = [*TWO_PHOTO_STEPS, "flow.depth=1", "flow.hidden_channels=4"]
TWO_STEPS = {  # by experiment: the settings that make a sweep's command a run of two quick steps
    "realnvp_cifar10": TWO_PHOTO_STEPS,
    "realnvp_photos": TWO_PHOTO_STEPS,
    "realnvp_moons": [
        *("data.n_train=1024", "data.n_val=64", "data.n_test=64", "samples.n=64"),
        *("trainer.val_check_interval=1", "trainer.max_steps=2"),
    ],
    "glow_cifar10": TWO_GLOW_STEPS,
    "glow_cifar10_modern": [*TWO_GLOW_STEPS, "optim.warmup_steps=1", "optim.cooldown_steps=1"],
    "glow_cifar10_additive5bit": [*TWO_GLOW_STEPS, "data.n_bits=5"],
    "glow_cifar10_conditional": [
        *TWO_GLOW_STEPS,
        "data.n_bits=5",
        "data.labels=true",
        "flow.n_classes=7",
    ],
    "glow_photos": TWO_GLOW_STEPS,
}
TWO_CROP_STEPS = [
    *("data.root=null", "data.val_root=null", "data.test_root=null", "data.n_val=1"),
    *("data.crop=32", "data.batch_size=4", "data.epoch_images=16", "data.num_workers=0"),
    *("samples.n=2", "trainer.val_check_interval=1", "trainer.max_steps=2", "metrics.lpips=[]"),
    *("optim.warmup_steps=1", "trainer.precision=32-true"),
]
SRFLOWS = [f"srflow_{name}" for name in ("div2k_x4", "div2k_x8", "celeba_x8", "bsds_x4")]
RRDBS = [name.replace("srflow", "rrdb") for name in SRFLOWS]
TWO_STEPS |= {
    recipe: [
        *(*TWO_CROP_STEPS, "flow.depth=1", "flow.hidden_channels=4", "eval.samples=1"),
        *("flow.encoder_channels=4", "flow.encoder_growth=2"),
    ]
    for recipe in (*SRFLOWS, "srflow_photos_x4")
}
TWO_STEPS |= {
    recipe: [*TWO_CROP_STEPS, "flow.n_blocks=1", "flow.channels=4", "flow.growth=2"]
    for recipe in RRDBS
}
METRICS = {"realnvp_moons": "val/nll"}  # by experiment or family, where it is not bits/dim
METRICS |= {"srflow": "val/bpd_noisy", "rrdb": "val/l1"}


def load(path):
    return yaml.safe_load(path.read_text())


def experiment_of(sweep):
    return Path(sweep["program"]).stem


def drawn(parameter, share):
    """A value of a parameter: the first or least at share 0, the last or greatest at 1."""
    if "value" in parameter:
        return parameter["value"]
    if "values" in parameter:
        return parameter["values"][round(share * (len(parameter["values"]) - 1))]
    low = parameter["min"]
    high = parameter["max"]
    return low * (high / low) ** share  # log-uniform, the only distribution used


def draw(sweep, share):
    return {key: drawn(parameter, share) for key, parameter in sweep["parameters"].items()}


def started_by_the_agent(sweep, values, folder, monkeypatch):
    """(command, environment) of what wandb's agent starts for these values.

    There is no server, and nothing is started.
    """
    from wandb import wandb_agent

    caught = []
    monkeypatch.setattr(
        wandb_agent, "AgentProcess", lambda **given: caught.append(given) or SimpleNamespace()
    )
    monkeypatch.setenv("WANDB_SWEEP_ID", "abcd1234")
    monkeypatch.setenv("WANDB_DIR", str(folder))
    monkeypatch.setenv("WANDB_RUN_ID", "")  # set by the agent; monkeypatch takes it back
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "")
    agent = object.__new__(wandb_agent.Agent)
    vars(agent).update(_in_jupyter=False, _function=None, _forward_signals=False, _run_processes={})
    agent._sweep_command = list(sweep["command"])
    arguments = {key: {"value": value} for key, value in values.items()}
    agent._command_run({"args": arguments, "run_id": RUN_ID, "program": sweep["program"]})
    (given,) = caught
    return given["command"], given["env"]


@pytest.fixture
def clean(tmp_path, monkeypatch):
    """Nobody logged in, a folder of its own, and a wandb that reads the environment afresh."""
    for name in (
        "WANDB_API_KEY",
        "WANDB_MODE",
        "WANDB_PROJECT",
        "SLURM_JOB_ID",
        "PAPERFLOWS_RUN_ID",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


@pytest.fixture
def swept(monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "abcd1234")
    monkeypatch.setenv("WANDB_RUN_ID", RUN_ID)


# ---------------------------------------------------------------------- the files


def violations(sweep):
    """What is wrong with a sweep by W&B's schema.

    The package of the schema needs an old numpy, so the file is read and nothing is imported.
    """
    jsonschema = pytest.importorskip("jsonschema")
    try:
        path = metadata.distribution("sweeps").locate_file("sweeps/config/schema.json")
    except metadata.PackageNotFoundError:
        pytest.skip("W&B's schema is missing: pip install --no-deps sweeps==0.3.0")
    validator = jsonschema.Draft7Validator(json.loads(Path(path).read_text()))
    return [error.message for error in validator.iter_errors(sweep)]


def test_there_are_sweeps():
    """There is one for each recipe, and two grids."""
    recipes = {path.stem for path in CONFIGS.glob("*.yaml")} - {"base"}
    assert {path.stem for path in FILES} == recipes | GRIDS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_sweep_ends_and_has_several_seeds(path):
    """The points of realnvp_moons are drawn by the seed, so that its runs share one."""
    sweep = load(path)
    assert 1 <= sweep["run_cap"] <= 100
    seeds = sweep["parameters"].get("seed", {}).get("values", [])
    assert len(seeds) == (0 if path.stem == "realnvp_moons" else 3)
    if sweep["method"] == "grid":
        assert sweep["run_cap"] == len(rows(path))


def test_a_grid_for_a_gpu():
    path = CONFIGS / "sweeps" / "realnvp_cifar10_gpu.yaml"
    configs = [compose(CIFAR, words_of_row(row)) for row in rows(path)]
    assert {config.trainer.accelerator for config in configs} == {"gpu"}
    assert {(config.optim.lr, config.seed) for config in configs} == {
        (lr, seed) for lr in (1e-3, 2e-3, 4e-3) for seed in range(3)
    }
    assert {config.logger.name for config in configs} == {"wandb"}


@pytest.mark.parametrize(
    ("stem", "own"),
    [
        ("glow_cifar10_additive5bit", set()),
        ("glow_cifar10_conditional", {"method", "optim.class_weight"}),
        ("glow_cifar10_modern", {"early_terminate", "command", "ema.decay", "data.batch_size"}),
        ("glow_photos", {"method", "flow.coupling", "flow.hidden_channels", "data.batch_size"}),
    ],
)
def test_what_the_glow_sweeps_share_stays_in_step(stem, own):
    """Recipes may extend one another and sweeps cannot: W&B reads a sweep from one file."""
    first, other = (load(CONFIGS / "sweeps" / f"{name}.yaml") for name in ("glow_cifar10", stem))
    first, other = (sweep | sweep.pop("parameters") for sweep in (first, other))
    different = {key for key in first | other if first.get(key) != other.get(key)}
    assert different == {"program", "name", *own}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_wandb_takes_the_file(path):
    assert violations(load(path)) == []


@pytest.mark.parametrize(
    "broken",
    [
        {"method": "gradient"},
        {"metric": {"name": "val/bpd", "goal": "lowest"}},
        {
            "parameters": {
                "optim.lr": {"distribution": "log_uniform_values", "min": "1e-5", "max": 1.0}
            }
        },
        {"parameters": {"optim.lr": {"vals": [1.0]}}},
        {"early_terminate": {"type": "hyperbund", "min_iter": 3}},
    ],
    ids=lambda broken: next(iter(broken)),
)
def test_wandb_does_not_take_a_broken_file(broken):
    assert violations(load(CONFIGS / "sweeps" / f"{CIFAR}.yaml") | broken)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_sweep_is_of_its_recipe(path):
    """Program, metric and parameters exist, and the recipe takes the ends of every range.

    The ends are written as W&B's agent writes them.
    """
    sweep = load(path)
    experiment = experiment_of(sweep)
    assert path.stem.removesuffix("_grid").removesuffix("_gpu") == experiment
    assert (ROOT / sweep["program"]).is_file()
    assert sweep["name"] == path.stem
    family = METRICS.get(experiment.partition("_")[0], "val/bpd")
    assert sweep["metric"]["name"] == METRICS.get(experiment, family)
    assert (sweep["method"] == "grid") == (path.stem in GRIDS)
    assert ("early_terminate" in sweep) == (sweep["method"] != "grid")
    assert not [key for key, parameter in sweep["parameters"].items() if "parameters" in parameter]
    own = [word for word in sweep["command"] if not word.startswith("${")]
    for share in (0, 1):
        values = draw(sweep, share)
        config = compose(experiment, [*own, *(f"{key}={value}" for key, value in values.items())])
        assert config.logger.name == "wandb"
        for key, value in values.items():
            assert OmegaConf.select(config, key) == value
            assert type(OmegaConf.select(config, key)) is type(value)


def test_the_agent_expands_a_command(clean, tmp_path):
    sweep = load(CONFIGS / "sweeps" / f"{CIFAR}.yaml")
    command, environment = started_by_the_agent(sweep, draw(sweep, 0), tmp_path, clean)
    assert command == [
        *("/usr/bin/env", "python", "reproduce/realnvp_cifar10.py"),
        *("preset=cpu", "logger.name=wandb", "trainer.max_steps=-1", "trainer.max_epochs=15"),
        *("optim.lr=0.0001", "flow.hidden_channels=8", "flow.n_blocks=1", "data.batch_size=32"),
        "seed=0",
    ]
    assert (environment["WANDB_SWEEP_ID"], environment["WANDB_RUN_ID"]) == ("abcd1234", RUN_ID)


# ---------------------------------------------------------------------- running them


def test_a_preempted_run_of_a_sweep_goes_on(clean, tmp_path):
    """SIGTERM stops the agent's command; then the agent starts that run with its whole config."""
    sweep = load(CONFIGS / "sweeps" / f"{CIFAR}.yaml")
    values = draw(sweep, 0) | {"data.batch_size": 32.0}  # as q_uniform draws it
    command, environment = started_by_the_agent(sweep, values, tmp_path, clean)
    command[2] = str(ROOT / command[2])
    given = [*TWO_STEPS[CIFAR], "trainer.max_steps=100000"]
    folder = tmp_path / "outputs" / CIFAR / RUN_ID
    assert stopped_in_training([*command, *given], environment, tmp_path, folder) == 75
    (part,) = parts_of(folder)
    assert (part.run.run_id, part.run.sweep_id) == (RUN_ID, "abcd1234")
    assert (len(part.records["preempting"]), part.records["exit"][0].exit_code) == (1, 75)
    assert part.config["optim.lr"] == part.config["optim"]["lr"] == 0.0001

    old = part.config
    command, _ = started_by_the_agent(
        sweep, old | {"_wandb": {"t": {"1": [1, 5]}}}, tmp_path, clean
    )
    stopped_at = max(row["trainer/global_step"] for row in part.rows)
    result = import_module(f"reproduce.{CIFAR}").main(
        [*command[3:], f"trainer.max_steps={stopped_at + 2}"]
    )
    assert result["run"] == RUN_ID
    assert result["images"] == (stopped_at + 2) * 32
    new = without(result["config"])
    assert new["trainer"].pop("max_steps") == stopped_at + 2
    assert old["trainer"].pop("max_steps") == 100000
    assert new == {key: value for key, value in without(old).items() if key in new}
    words = {
        "preset=cpu",
        "logger.name=wandb",
        "trainer.max_epochs=15",
        f"trainer.max_steps={stopped_at + 2}",
    }
    words |= {"optim.lr=0.0001", "flow.hidden_channels=8", "flow.n_blocks=1", "data.batch_size=32"}
    assert set(result["overrides"]) == words | set(given) - {
        "trainer.max_steps=2",
        "trainer.max_steps=100000",
    }
    parts = parts_of(folder)
    assert [part.run.run_id for part in parts] == [RUN_ID, RUN_ID]
    assert parts[1].rows[0]["trainer/global_step"] >= stopped_at  # it went on, and did not begin


def stopped_in_training(command, environment, cwd, folder):
    """The exit code of a process that gets SIGTERM once it trains."""
    paths = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    with (cwd / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment | paths, stdout=output, stderr=output
        )
        try:
            deadline = time.monotonic() + 120
            while (
                len(curve_rows(folder)) < 4
                and process.poll() is None
                and time.monotonic() < deadline
            ):
                time.sleep(0.1)
            process.terminate()
            return process.wait(60)
        finally:
            process.kill()


def curve_rows(folder):
    path = folder / "curve.csv"
    return path.read_text().splitlines() if path.is_file() else []


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)
def test_the_expanded_command_runs_two_steps(path, clean, tmp_path):
    sweep = load(path)
    command, _ = started_by_the_agent(sweep, draw(sweep, 0), tmp_path, clean)
    experiment = experiment_of(sweep)
    result = import_module(f"reproduce.{experiment}").main([*command[3:], *TWO_STEPS[experiment]])
    assert result["run"] == RUN_ID
    assert result["images"] == 2 * result["config"]["data"]["batch_size"]
    assert result["config"]["logger"]["name"] == "wandb"
    tiny = {word.split("=")[0] for word in TWO_STEPS[experiment]}
    for key, value in draw(sweep, 0).items():
        assert key in tiny or OmegaConf.select(OmegaConf.create(result["config"]), key) == value


# ---------------------------------------------------------------------- what the agent writes


def words(values):
    """As wandb's agent writes them where the command has ${args_no_hyphens}."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    return create_sweep_command_args({"args": {key: {"value": v} for key, v in values.items()}})[
        "args_no_hyphens"
    ]


def without(config):
    return {key: value for key, value in config.items() if key not in OF_THE_RUN}


def as_a_server_may_store_it(value):
    """JSON without a difference between 100.0 and 100."""
    if isinstance(value, dict):
        return {key: as_a_server_may_store_it(part) for key, part in value.items()}
    if isinstance(value, list):
        return [as_a_server_may_store_it(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@pytest.mark.parametrize(
    "stored", [lambda config: config, as_a_server_may_store_it], ids=["as-is", "integers"]
)
@pytest.mark.parametrize(
    ("experiment", "given"),
    [
        (
            CIFAR,
            [
                "optim.lr=1e-5",
                "trainer.max_time=00:01:00:00",
                "optim.clip_norm=null",
                "optim.betas=[0.8, 0.99]",
            ],
        ),
        (
            CIFAR,
            [
                "preset=demo",
                "logger.project=123",
                "ema.decay=0.5",
                "seed=3",
                "data.n_val=0",
                "trainer.devices=2",
            ],
        ),
        (
            CIFAR,
            [
                "preset=cpu",
                "data.name=photos",
                "data.size=16",
                "trainer.compile=true",
                "flow.n_scales=1",
            ],
        ),
        (
            "realnvp_moons",
            [
                "logger.name=wandb",
                "flow.n_couplings=4",
                "samples.temperatures=[1]",
                "trainer.devices=1",
            ],
        ),
    ],
)
def test_a_resumed_run_has_the_config_it_had(experiment, given, stored, swept):
    """The agent sends the whole config of a preempted run, its sections as Python dicts."""
    old = OmegaConf.to_container(compose(experiment, given))
    old["trainer"]["precision"] = "32-true"  # load_config has resolved it
    sent = stored(json.loads(json.dumps({**old, "run_dir": "outputs/x/y", "overrides": given})))
    sent |= {
        "optim.lr": sent["optim"]["lr"],
        "_wandb": {"cli_version": "0.31.0", "m": [{"1": "a", "6": [3]}]},
    }
    command = [*(word for word in given if word.startswith("preset=")), *words(sent)]
    arguments = agent_arguments(command, experiment)
    assert len(arguments) < 12  # what differs from the recipe, not all of it
    new = OmegaConf.to_container(compose(experiment, arguments))
    assert json.dumps(without(new)) == json.dumps(without(old))  # to the type of every value


def test_a_run_preempted_before_its_config_was_known_begins(swept):
    command = ["preset=cpu", *words({"optim.lr": 0.001, "flow.n_blocks": 4, "_wandb": {"t": {}}})]
    assert compose(CIFAR, agent_arguments(command, CIFAR)).flow.n_blocks == 4


def test_a_first_start_is_left_as_it_is_but_for_integers(swept):
    given = [
        "preset=cpu",
        "trainer.max_time=null",
        "trainer.compile=true",
        "data.root=/a b/c",
        "--print-config",
    ]
    arguments = agent_arguments(
        [*given, *words({"flow.n_blocks": 4.0, "optim.lr": 1.0, "ema.decay": None})], CIFAR
    )
    assert arguments == [
        "--print-config",
        *given[:-1],
        "flow.n_blocks=4",
        "optim.lr=1.0",
        "ema.decay=null",
    ]
    with pytest.raises(ConfigError, match="did you mean cpu"):
        agent_arguments(["preset=cpuu"], CIFAR)


def test_outside_of_a_sweep_arguments_are_what_was_given(monkeypatch):
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    monkeypatch.setenv("WANDB_RUN_ID", RUN_ID)  # alone it does not make a sweep
    given = ["flow.n_blocks=8.0", "experiment=x", "trainer={'devices': 1}"]
    assert not in_sweep()
    assert agent_arguments(given, CIFAR) is given
    with pytest.raises(ConfigError, match="trainer is a section"):
        compose(CIFAR, ["trainer={'devices': 1}"])


def test_a_run_of_another_experiment_is_refused(swept):
    with pytest.raises(
        ConfigError, match="runs are of realnvp_moons: its program is not realnvp_cifar10's"
    ):
        agent_arguments(["experiment=realnvp_moons", "flow={'n_couplings': 4}"], CIFAR)


def test_a_key_that_the_recipe_no_longer_has_is_named(swept):
    arguments = agent_arguments(
        ["experiment=realnvp_cifar10", "flow={'n_blocks': 8, 'width': 4}"], CIFAR
    )
    assert arguments == ["flow.width=4"]
    with pytest.raises(ConfigError, match=r"flow\.width is not a known key"):
        compose(CIFAR, arguments)
