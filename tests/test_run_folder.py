"""What a run folder asks of a run that goes on in it, and of the machine."""

import errno
import logging
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from processes import Run

from flows.glow import Glow
from lightning_modules.callbacks.checkpoints import Checkpoints
from reproduce import load
from reproduce.config import ConfigError, compose
from reproduce.experiment import load_config
from reproduce.run_folder import (
    check_checkpoint,
    check_run_dir,
    newest_checkpoint,
    open_folder,
)

TINY_GLOW = ["preset=cpu", "flow.n_levels=1", "flow.depth=1", "flow.hidden_channels=2"]


class Module(torch.nn.Module):
    """What `check_checkpoint` reads of an objective."""

    def __init__(self, config, lr=0.25):
        super().__init__()
        self.flow = Glow((3, 2, 2), **config.flow)

    def constructors(self):
        return {"optim": type(self), "eval": type(self), "flow": Glow}


def checked(path, stored, config, module=None):
    """The message with which a checkpoint of the config `stored` is refused; None: it is taken."""
    module = module or Module(config)
    origin = {"experiment": config.experiment, "config": stored, "commit": "0123abc"}
    checkpoint = {"paperflows": origin, "state_dict": module.state_dict()}
    try:
        check_checkpoint(path, checkpoint, config, module, 1)
    except ConfigError as error:
        return str(error)


def test_a_key_that_a_recipe_has_got_since_counts_as_its_default(tmp_path):
    """The recipe of additive Glow once had no min_scale; the flow's own default is 0."""
    path = tmp_path / "step-00000001.ckpt"
    config = compose("glow_cifar10_additive5bit", TINY_GLOW)
    old = OmegaConf.to_container(config)
    del old["flow"]["min_scale"]
    assert checked(path, old, config) is None
    other = compose("glow_cifar10_additive5bit", [*TINY_GLOW, "flow.min_scale=0.5"])
    assert f"{path} was trained with flow.min_scale=0.0: say the same" in checked(path, old, other)
    del old["flow"]["depth"]  # the default is 32
    assert f"{path} was trained with flow.depth=32: say the same" in checked(path, old, config)


def test_a_key_that_a_recipe_no_longer_has_counts_as_its_default(tmp_path):
    config = compose("glow_cifar10_additive5bit", TINY_GLOW)
    old = OmegaConf.to_container(config)
    OmegaConf.set_struct(config, False)
    del config.flow["min_scale"]
    assert checked(tmp_path, old, config) is None
    old["flow"]["min_scale"] = 0.5
    assert f"{tmp_path} was trained with flow.min_scale=0.5: say the same" in checked(
        tmp_path, old, config
    )


def test_the_defaults_of_an_objective_count_too_also_those_that_it_hands_on(tmp_path):
    class Objective(Module):
        def __init__(self, config, betas=(0.9, 0.999), **arguments):
            super().__init__(config, **arguments)

    config = compose("glow_cifar10", TINY_GLOW)
    old = OmegaConf.to_container(config)
    config.optim.betas = [0.9, 0.999]
    config.optim.lr = 0.25
    del old["optim"]["betas"], old["optim"]["lr"]
    assert checked(tmp_path, old, config, Objective(config)) is None


def test_how_many_noise_samples_are_evaluated_may_change_in_a_run_that_goes_on(tmp_path):
    config, more = (
        compose("glow_cifar10", [*TINY_GLOW, f"eval.noise_samples={k}"]) for k in (1, 4)
    )
    assert checked(tmp_path, OmegaConf.to_container(config), more) is None
    other = compose("glow_cifar10", [*TINY_GLOW, "eval.noise_seed=4"])
    assert "was trained with eval.noise_seed=0" in checked(
        tmp_path, OmegaConf.to_container(config), other
    )


@pytest.mark.parametrize("setting", ["optim.schedule=cosine", "optim.cooldown_steps=2"])
def test_the_last_step_may_not_change_where_the_learning_rate_falls_towards_it(tmp_path, setting):
    words = [*TINY_GLOW, setting]
    config = compose("glow_cifar10", [*words, "trainer.max_steps=90"])
    longer = compose("glow_cifar10", [*words, "trainer.max_steps=91"])
    stored = OmegaConf.to_container(config)
    assert checked(tmp_path, stored, config) is None
    assert checked(tmp_path, stored, longer) == (
        f"{tmp_path} was trained with trainer.max_steps=90: say the same, or give another run_dir"
    )
    constant = ["optim.schedule=constant", "optim.cooldown_steps=0"]
    config = compose("glow_cifar10", [*TINY_GLOW, *constant, "trainer.max_steps=90"])
    longer = compose("glow_cifar10", [*TINY_GLOW, *constant, "trainer.max_steps=91"])
    assert checked(tmp_path, OmegaConf.to_container(config), longer) is None


# ------------------------------------------------------------------------- what a folder holds


def config_for(folder, *arguments):
    config = compose("realnvp_moons", [f"run_dir={folder}", "resume=auto", *arguments])
    assert config.checkpoint.every_n_steps > 100
    return config


def add_checkpoint(folder, name):
    """A file that `read_checkpoint` takes."""
    path = folder / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"paperflows": {"experiment": "realnvp_moons"}, "state_dict": {}}
    torch.save(content, path)
    return path


def add_curve(folder, *steps):
    folder.mkdir(exist_ok=True)
    rows = [f"{step},{32 * step},1.0" for step in steps]
    (folder / "curve.csv").write_text("\n".join(["step,images,seconds", *rows, ""]))


def test_a_folder_whose_step_checkpoints_are_gone_is_refused(tmp_path):
    """A run would begin at step 0 and overwrite its curve and its best weights."""
    config = config_for(tmp_path / "run", "checkpoint.every_n_steps=1000")
    add_curve(tmp_path / "run", 0, 1000, 2000)
    add_checkpoint(tmp_path / "run", "best.ckpt")
    with pytest.raises(ConfigError) as refusal:
        check_run_dir(config)
    line = str(refusal.value)
    assert "holds the curve of 2000 steps, but its step-*.ckpt are gone: give another" in line
    assert "copy its best.ckpt to step-00000000.ckpt to go on from that" in line
    assert "\n" not in line
    add_checkpoint(tmp_path / "run", "step-00000000.ckpt")
    check_run_dir(config)
    path, _ = newest_checkpoint(tmp_path / "run")
    assert path.name == "step-00000000.ckpt"


def test_best_weights_alone_are_a_run_too(tmp_path):
    add_checkpoint(tmp_path / "run", "best.ckpt")
    config = config_for(tmp_path / "run")
    config.resume = None
    with pytest.raises(ConfigError, match="holds a run: add resume=auto"):
        check_run_dir(config)


def test_a_run_killed_before_its_first_periodic_checkpoint_goes_on_from_its_best(tmp_path):
    words = ["trainer.max_steps=9", "trainer.val_check_interval=2", "checkpoint.every_n_steps=100"]
    killed = Run(tmp_path / "run", *words, kill=(5, 1))
    assert killed.wait() == [-9], killed.output()
    files = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert files == ["best.ckpt"]
    resumed = Run(tmp_path / "run", *words, "resume=auto")
    assert resumed.wait() == [0], resumed.output()
    assert "holds no step-*.ckpt yet: taking best.ckpt" in resumed.output()
    steps = [step for step, _ in resumed.losses()]  # a step that was repeated had the same loss
    assert steps == list(range(9))
    lines = (tmp_path / "run" / "curve.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["step", "0", "2", "4", "6", "8", "9"]


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", "null", '{"experiment": 3}', "\udcff"])
def test_a_damaged_result_is_one_line_with_the_files_name(tmp_path, content):
    add_curve(tmp_path / "run", 0)
    path = tmp_path / "run" / "result.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError) as refusal:
        check_run_dir(config_for(path.parent))
    assert f"{path} is not the result of a run: delete it" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigError, match="restore it, or rename it") as refusal:
        load(path.parent)
    assert str(refusal.value).startswith(f"{path} is")
    assert "\n" not in str(refusal.value)


def as_a_dangling_link(path):
    path.symlink_to(path.parent / "nowhere")


def as_a_link_to_itself(path):
    path.symlink_to(path)


def as_a_folder(path):
    path.mkdir()


@pytest.mark.parametrize("place", [as_a_dangling_link, as_a_link_to_itself, as_a_folder])
def test_the_one_before_is_taken_where_the_newest_is_no_file(tmp_path, caplog, place):
    good = add_checkpoint(tmp_path, "step-00000002.ckpt")
    place(good.with_name("step-00000004.ckpt"))
    path, _ = newest_checkpoint(tmp_path)
    assert path == good
    assert "step-00000004.ckpt in" in caplog.text
    assert "is damaged: taking step-00000002.ckpt before it" in caplog.text
    good.unlink()
    with pytest.raises(ValueError, match=r"step-00000004.ckpt damaged.: give another run_dir$"):
        newest_checkpoint(tmp_path)


def test_a_folder_among_the_checkpoints_does_not_end_the_run_that_prunes_them(tmp_path):
    class Trainer:
        global_step = 8
        is_global_zero = True

    for step in (2, 4, 6):
        add_checkpoint(tmp_path, f"step-{step:08d}.ckpt")
    (tmp_path / "checkpoints" / "step-00000005.ckpt").mkdir()
    callback = Checkpoints(tmp_path / "checkpoints", 2, None)
    callback._save = lambda trainer, name: bool(add_checkpoint(tmp_path, name))
    assert callback.save_step(Trainer())
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}.ckpt" for step in (5, 6, 8)]


def test_a_full_disk_leaves_a_gap_in_the_log_and_no_traceback(tmp_path, monkeypatch, capsys):
    log = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", False)
    log.setLevel(logging.INFO)
    open_folder(tmp_path / "run")
    [handler] = log.handlers

    def full(text):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(handler, "stream", type("Full", (), {"write": staticmethod(full)}))
        log.info("lost")
    log.info("kept")
    assert (tmp_path / "run" / "log.txt").read_text().endswith(" kept\n")
    assert capsys.readouterr().err == ""


def test_a_tilde_is_the_users_home(tmp_path, monkeypatch):
    """A shell leaves it alone behind an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config("reproduce/realnvp_moons.py", "", ["run_dir=~/runs/a"])
    assert Path(config.run_dir) == tmp_path / "runs" / "a"
    add_curve(tmp_path / "run", 0)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'run'} holds no checkpoint"):
        load("~/run")
