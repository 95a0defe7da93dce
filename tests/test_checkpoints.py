"""Checkpoints are whole or absent; the newest that loads is taken; all are finite."""

import os
import resource
import shutil
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from processes import Run, start
from test_density import density, tiny_flow

from lightning_modules.callbacks.checkpoints import Checkpoints, finite
from lightning_modules.checkpoint_io import SafeCheckpointIO
from reproduce import realnvp_moons
from reproduce.config import ConfigError, compose
from reproduce.model import load_model
from reproduce.run_folder import newest_checkpoint, read_checkpoint, step_checkpoints
from results.metrics import Metric

BIG = {"state_dict": {"w": torch.arange(100_000.0)}}
OLD = {"state_dict": {"w": torch.ones(3)}}


def save(content, path):
    SafeCheckpointIO().save_checkpoint(content, path)


def load(path):
    return torch.load(path, weights_only=True)


def alone(function, *arguments, log):
    """The exit code of a process that calls `function`."""
    [process] = start(1, lambda rank, *rest: function(*rest), *arguments, log=log)
    process.join(60)
    return process.exitcode


# ----------------------------------------------------------------------------- writing


def test_a_checkpoint_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "a.ckpt"
    save(OLD, path)
    save(BIG, str(path))
    assert torch.equal(load(path)["state_dict"]["w"], BIG["state_dict"]["w"])
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]


def _killed_while_writing(path):
    half = torch.save

    def half_then_die(content, file):
        half(content, file)
        file.truncate(50_000)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half_then_die
    save(BIG, path)


def test_a_kill_while_writing_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.ckpt"
    save(OLD, path)
    assert alone(_killed_while_writing, path, log=tmp_path / "log") == -signal.SIGKILL
    assert torch.equal(load(path)["state_dict"]["w"], torch.ones(3))
    assert (tmp_path / "a.ckpt.part").stat().st_size == 50_000
    save(BIG, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ckpt", "log"]


def _without_space(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    with pytest.raises(OSError, match=r"a\.ckpt could not be written: File too large$"):
        save(BIG, path)


def _without_permission(path):
    if os.getuid() == 0:  # who may write everywhere
        os.setuid(65534)
    with pytest.raises(OSError, match=r"a\.ckpt could not be written: Permission denied$"):
        save(BIG, path)


@pytest.mark.parametrize("harm", [_without_space, _without_permission])
def test_what_cannot_be_written_is_one_line_and_the_old_one_stays(harm):
    folder = Path(tempfile.mkdtemp())  # not under tmp_path, into which nobody may look
    try:
        path = folder / "a.ckpt"
        save(OLD, path)
        log = folder / "log"
        log.touch()
        path.chmod(0o444)
        if harm is _without_permission:
            folder.chmod(0o555)
        assert alone(harm, path, log=log) == 0, log.read_text()
        assert torch.equal(load(path)["state_dict"]["w"], torch.ones(3))
        assert sorted(p.name for p in folder.iterdir()) == ["a.ckpt", "log"]
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_the_disk_fills_up_on_rank_0_and_both_ranks_stop_with_one_line(tmp_path):
    run = Run(tmp_path / "run", "trainer.max_steps=50", ranks=2, full=3)
    assert run.wait() == [1, 0], run.output()
    line = run.output().strip().splitlines()[-1]
    assert line.startswith("error: stopped at step 4: ")
    assert (
        "step-00000004.ckpt could not be written: File too large. The older checkpoints are intact"
        in line
    )
    assert "Traceback" not in run.output()
    path, checkpoint = newest_checkpoint(tmp_path / "run")
    assert (path.name, checkpoint["global_step"]) == ("step-00000002.ckpt", 2)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.part"))


# ----------------------------------------------------------------------------- reading


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    run = Run(folder, "trainer.max_steps=6", "trainer.val_check_interval=3")
    assert run.wait() == [0], run.output()
    return folder


@pytest.fixture
def unfinished(six_steps, tmp_path):
    """A copy of the run as if it had been killed after step 6, before its test."""
    shutil.copytree(six_steps, tmp_path / "run")
    shutil.copy(f"{six_steps}.trace0", tmp_path / "run.trace0")
    (tmp_path / "run" / "result.json").unlink()
    return tmp_path / "run"


def test_the_newest_two_and_the_best_are_kept(six_steps):
    names = sorted(p.name for p in (six_steps / "checkpoints").iterdir())
    assert names == ["best.ckpt", "step-00000004.ckpt", "step-00000006.ckpt"]
    best, newest = (
        read_checkpoint(six_steps / "checkpoints" / name) for name in (names[0], names[2])
    )
    assert best["global_step"] in (3, 6)
    assert newest["callbacks"]["Checkpoints"]["best"] == best["callbacks"]["Checkpoints"]["best"]
    assert newest["paperflows"]["n_micro_batches"] == 1


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3000])


def test_a_run_of_another_layout_is_named_with_its_commit(tmp_path):
    """As runs of Glow are that were made before its steps had modules of their own."""
    config = compose("realnvp_moons", ["flow.n_couplings=1", "flow.hidden_channels=2"])
    weights = {
        f"flow.{key}": value
        for key, value in realnvp_moons.make_flow(config, (2,)).state_dict().items()
    }
    origin = {
        "experiment": "realnvp_moons",
        "config": OmegaConf.to_container(config),
        "shape": [2],
        "commit": "0123abc",
    }
    torch.save({"paperflows": origin, "state_dict": weights}, tmp_path / "same.ckpt")
    assert set(load_model(tmp_path / "same.ckpt").stored.weights) == set(weights)
    key = next(iter(weights))
    torch.save(
        {"paperflows": origin, "state_dict": weights | {key: torch.zeros(7)}},
        tmp_path / "other.ckpt",
    )
    with pytest.raises(
        ConfigError, match=f"other.ckpt does not fit this flow: {key} is .7,. there and .* 0123abc"
    ) as e:
        load_model(tmp_path / "other.ckpt")
    assert "\n" not in str(e.value)


def flip_a_bit(path):
    """Flip a bit of a weight, which torch.load would not notice."""
    content = bytearray(path.read_bytes())
    weights = load(path)["state_dict"]
    largest = max((v for v in weights.values() if v.is_floating_point()), key=torch.Tensor.numel)
    place = content.index(bytes(largest.untyped_storage()))  # as it lies in memory, channels_last
    content[place + 1] ^= 16
    path.write_bytes(content)
    assert not torch.equal(max(load(path)["state_dict"].values(), key=torch.Tensor.numel), largest)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, empty])
def test_the_newest_that_loads_is_taken_and_named(unfinished, harm, caplog):
    harm(unfinished / "checkpoints" / "step-00000006.ckpt")
    path, checkpoint = newest_checkpoint(unfinished)
    assert (path.name, checkpoint["global_step"]) == ("step-00000004.ckpt", 4)
    assert "step-00000006.ckpt in" in caplog.text
    assert "is damaged: taking step-00000004.ckpt before it" in caplog.text


def test_a_run_goes_on_from_the_one_before_a_damaged_one(unfinished, six_steps):
    truncate(unfinished / "checkpoints" / "step-00000006.ckpt")
    resumed = Run(unfinished, "trainer.max_steps=6", "trainer.val_check_interval=3", "resume=auto")
    assert resumed.wait() == [0], resumed.output()
    assert len(resumed.losses()) == 6  # steps 5 and 6 again, and the same bits (`losses` compares)
    whole = load(six_steps / "checkpoints" / "step-00000006.ckpt")["state_dict"]
    assert all(torch.equal(whole[k], v) for k, v in resumed.final()["state_dict"].items())


def test_a_run_whose_checkpoints_all_fail_to_load_is_refused(unfinished):
    for path in step_checkpoints(unfinished):
        truncate(path)
    before = (unfinished / "curve.csv").read_bytes()
    run = Run(unfinished, "trainer.max_steps=6", "resume=auto")
    assert run.wait() == [1]
    assert "(step-00000006.ckpt, step-00000004.ckpt damaged): give another run_dir" in run.output()
    assert (unfinished / "curve.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["data.size=16"], "was trained with data.size=8: say the same"),
        (["optim.lr=0.5"], "was trained with optim.lr=0.001: say the same"),
    ],
)
def test_another_recipe_is_refused_by_name(unfinished, change, message):
    run = Run(unfinished, "trainer.max_steps=8", "resume=auto", *change)
    assert run.wait() == [1]
    assert message in run.output()


def test_weights_of_another_shape_are_refused_by_name(unfinished):
    """The recipe is the same, but the code has changed."""
    run = Run(unfinished, "trainer.max_steps=8", "resume=auto", plain=True)
    assert run.wait() == [1]
    assert "does not fit this flow: flow." in run.output()
    assert "Traceback" not in run.output()


def test_another_number_of_micro_batches_is_refused(tmp_path):
    first = Run(tmp_path / "run", "trainer.max_steps=2", "data.micro_batch=8", plain=True)
    assert first.wait() == [0], first.output()
    (tmp_path / "run" / "result.json").unlink()
    second = Run(
        tmp_path / "run", "trainer.max_steps=4", "data.micro_batch=4", "resume=auto", plain=True
    )
    assert second.wait() == [1]
    assert "trained with 2 micro-batches a step and process, now there are 4" in second.output()


def test_a_strangers_hpc_checkpoint_is_refused(tmp_path):
    """Lightning would silently take the newest hpc_ckpt in the folder of any job."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "hpc_ckpt_3.ckpt").write_bytes(b"")
    run = Run(tmp_path / "run", "trainer.max_steps=2")
    assert run.wait() == [1]
    assert "holds hpc_ckpt_*.ckpt of another program" in run.output()


def test_where_the_best_is_damaged_the_newest_is_tested(unfinished):
    truncate(unfinished / "checkpoints" / "best.ckpt")
    run = Run(unfinished, "trainer.max_steps=6", "trainer.val_check_interval=3", "resume=auto")
    assert run.wait() == [0], run.output()
    assert "best.ckpt is damaged: taking the newest in its place" in run.output()
    assert (
        '"checkpoint": "checkpoints/step-00000006.ckpt"' in (unfinished / "result.json").read_text()
    )


# ----------------------------------------------------------------------------- finite


class Trainer:
    """As much of a Trainer as the end of a validation needs; notes what is saved."""

    sanity_checking = False
    is_global_zero = True
    global_step = 3
    state = SimpleNamespace(fn="fit")
    strategy = SimpleNamespace(broadcast=lambda problem: problem)

    def __init__(self, module, value, metric="bpd"):
        self.lightning_module = module
        self.callback_metrics = {f"val/{metric}": torch.tensor(value)}
        self.saved = []

    def save_checkpoint(self, path):
        self.saved.append(path.name)


def test_the_best_score_is_that_of_the_best_file(tmp_path):
    """A score does not count if it is not finite, or if its weights cannot be saved."""
    good = density(tiny_flow())
    bad = density(tiny_flow())
    bad.skipped_last.fill_(True)
    callback = Checkpoints(tmp_path, 100, Metric("bpd", "lower", "bits/dim"))
    written = []
    scores = [
        (8.0, good),
        (7.0, bad),
        (-torch.inf, good),
        (torch.nan, good),
        (7.5, good),
        (7.6, good),
    ]
    for value, module in scores:
        trainer = Trainer(module, value)
        callback.on_validation_end(trainer, module)
        written.append((trainer.saved, callback.best))
    assert written == [
        (["best.ckpt"], 8.0),
        ([], 8.0),
        ([], 8.0),
        ([], 8.0),
        (["best.ckpt"], 7.5),
        ([], 7.5),
    ]


def test_the_best_is_the_highest_where_higher_is_better(tmp_path):
    """A PSNR of 20 and then 30, with the score taken over from a checkpoint each time."""
    psnr = Metric("psnr", "higher", "dB")
    module = density(tiny_flow())
    written = []
    callback = Checkpoints(tmp_path, 100, psnr)
    for value in (20.0, 30.0, torch.inf, 25.0, 31.0):
        trainer = Trainer(module, value, "psnr")
        callback.on_validation_end(trainer, module)
        written.append((trainer.saved, callback.best))
        state = callback.state_dict()
        callback = Checkpoints(tmp_path, 100, psnr)
        callback.load_state_dict(state)
    yes = ["best.ckpt"]
    no = []
    assert written == [(yes, 20.0), (yes, 30.0), (no, 30.0), (no, 30.0), (yes, 31.0)]


def test_what_is_no_checkpoint_neither_counts_nor_ends_the_run(tmp_path):
    """A folder, and links to nothing and to themselves, with names of checkpoints."""
    for step in (1, 2, 3):
        (tmp_path / f"step-{step:08d}.ckpt").write_bytes(b"")
    (tmp_path / "step-00000004.ckpt").mkdir()
    (tmp_path / "step-00000005.ckpt").symlink_to("nowhere")
    (tmp_path / "step-00000006.ckpt").symlink_to("step-00000006.ckpt")
    module = density(tiny_flow())
    trainer = Trainer(module, 8.0)
    trainer.global_step = 7
    trainer.save_checkpoint = lambda path: path.write_bytes(b"")
    assert Checkpoints(tmp_path, 1, None).save_step(trainer)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step-{step:08d}.ckpt" for step in (3, 4, 5, 6, 7)
    ]


@pytest.mark.parametrize("harm", ["folder", "link to nothing", "link to itself"])
def test_a_checkpoint_in_the_place_of_something_else_is_one_line_or_replaces_it(tmp_path, harm):
    """A link is replaced; a folder stays, and the message names it."""
    path = tmp_path / "step-00000001.ckpt"
    if harm == "folder":
        path.mkdir()
        with pytest.raises(OSError, match=r"step-00000001\.ckpt could not be written: Is a dir"):
            save(OLD, path)
        assert list(tmp_path.iterdir()) == [path]
        return
    path.symlink_to(path if harm == "link to itself" else "nowhere")
    save(OLD, path)
    assert torch.equal(load(path)["state_dict"]["w"], torch.ones(3))
    assert not path.is_symlink()


@pytest.mark.parametrize("every_n_steps", [0, -1, 1.5, True])
def test_steps_between_checkpoints_are_at_least_one(tmp_path, every_n_steps):
    with pytest.raises(
        ValueError,
        match=rf"checkpoint\.every_n_steps={every_n_steps} is out of range: .* at least 1",
    ):
        Checkpoints(tmp_path, every_n_steps, None)


def test_a_run_that_goes_on_with_validations_has_no_score_before_them(tmp_path):
    without = Checkpoints(tmp_path, 100, None)
    without.on_validation_end(Trainer(density(tiny_flow()), 8.0), None)
    after = Checkpoints(tmp_path, 100, Metric("bpd", "lower", "bits/dim"))
    after.load_state_dict(without.state_dict())
    module = density(tiny_flow())
    trainer = Trainer(module, 9.0)
    after.on_validation_end(trainer, module)
    assert (trainer.saved, after.best) == (["best.ckpt"], 9.0)


def test_finite_looks_at_weights_statistics_and_the_newest_step():
    module = density(tiny_flow())
    assert finite(module)
    for harm in (
        lambda m: m.flow.scales[0].layers[0].log_scale_factor.data.fill_(torch.nan),
        lambda m: m.flow.scales[0].layers[0].norm.running_var.fill_(torch.inf),
        lambda m: m.skipped_last.fill_(True),
    ):
        module = density(tiny_flow())
        harm(module)
        assert not finite(module)
