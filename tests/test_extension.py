"""A finished run whose command is repeated with the same settings, a later end, or other ones."""

import json
import signal
from datetime import datetime

import pytest
import torch
from processes import TINY, Run

from reproduce import load, realnvp_cifar10
from reproduce.config import override
from reproduce.run_folder import read_checkpoint, step_checkpoints

SHORT = "trainer.max_steps=4"
LONG = "trainer.max_steps=9"


def run(folder, *arguments):
    return realnvp_cifar10.main(override([*TINY, f"run_dir={folder}"], arguments))


def ended(folder, *arguments):
    """The exit code, or the line, with which a command ends before it trains."""
    before = contents(folder)
    with pytest.raises(SystemExit) as end:
        run(folder, "resume=auto", *arguments)
    assert contents(folder) == before
    if isinstance(end.value.code, str):
        return end.value.code.removeprefix("error: ")
    return end.value.code


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def final(folder):
    return read_checkpoint(step_checkpoints(folder)[0])


def same_weights(a, b):
    return all(torch.equal(value, b["state_dict"][key]) for key, value in a["state_dict"].items())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder, SHORT)
    return folder


def test_the_same_settings_are_finished(finished, capsys):
    assert ended(finished, SHORT) == 0
    assert capsys.readouterr().out == f"{finished} is finished: see {finished / 'result.json'}\n"
    # An unfinished run may change these keys, too.
    assert ended(finished, SHORT, "data.num_workers=1", "trainer.log_every_n_steps=7") == 0


@pytest.mark.parametrize(
    ("change", "stored"),
    [
        ("seed=3", "seed=0"),
        ("flow.hidden_channels=5", "flow.hidden_channels=4"),
        ("optim.lr=0.25", "optim.lr=0.001"),
        ("data.n_bits=5", "data.n_bits=8"),
        ("ema.decay=0.5", "ema.decay=null"),
        ("optim.schedule=cosine", "optim.schedule=constant"),
        ("trainer.max_steps=3", "trainer.max_steps=4"),
        ("trainer.max_epochs=1", "trainer.max_epochs=null"),
        ("trainer.max_time=00:00:00:09", "trainer.max_time=null"),
    ],
)
def test_other_settings_are_refused_by_name(finished, change, stored):
    line = f"{finished} is finished, and was trained with {stored}: say the same, or give another"
    line += f" run_dir (with init_from={finished} it starts from these weights)"
    assert ended(finished, *override([SHORT], [change])) == line
    if "max_steps" not in change:
        assert ended(finished, LONG, change) == line


@pytest.mark.parametrize(
    ("change", "tested"),
    [
        ("eval.noise_samples=3", "eval.noise_samples=1"),
        ("checkpoint.select=last", "checkpoint.select=best"),
        ("trainer.limit_test_batches=1", "trainer.limit_test_batches=null"),
    ],
)
def test_another_test_of_a_finished_run_is_refused(finished, change, tested):
    line = ended(finished, SHORT, change)
    assert f"{finished} is finished, and was tested with {tested}: say the same, or" in line
    assert line.endswith(f"python -m reproduce.evaluate {finished}")


def test_all_that_differs_is_named(finished):
    line = ended(finished, "trainer.max_steps=3", "seed=3", "optim.lr=0.25", "flow.n_blocks=2")
    assert "with flow.n_blocks=1 optim.lr=0.001 seed=0 trainer.max_steps=4: say the same" in line


def test_without_resume_a_finished_folder_is_refused(finished):
    with pytest.raises(SystemExit, match=f"{finished} holds a run: add resume=auto to go on"):
        run(finished, LONG)
    for path in (finished / "result.json", finished / "checkpoints" / "best.ckpt"):
        assert path.is_file()


def test_a_result_alone_is_a_run_that_is_not_overwritten(finished, tmp_path):
    content = (finished / "result.json").read_bytes()
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(SystemExit, match="holds a run: add resume=auto to go on"):
        run(tmp_path, SHORT)
    assert ended(tmp_path, SHORT) == 0
    assert ended(tmp_path, LONG) == (
        f"{tmp_path} is finished, but its step-*.ckpt, from which it would go on, are gone: "
        f"start a new run from its weights with init_from={tmp_path}, in another run_dir"
    )


def test_a_result_without_a_config_is_named(finished, tmp_path):
    result = json.loads((finished / "result.json").read_text())
    damaged = [
        {key: value for key, value in result.items() if key != "config"},
        result | {"config": {"trainer": {}}},
        result | {"config": result["config"] | {"trainer": 3}},
        result | {"config": result["config"] | {"trainer": {"max_time": "1:2"}}},
        result | {"images": None},
    ]
    for content in damaged:
        (tmp_path / "result.json").write_text(json.dumps(content))
        assert ended(tmp_path, SHORT) == (
            f"{tmp_path / 'result.json'} is not the result of a run: delete it, and resume=auto "
            "goes on from the newest checkpoint"
        )


def test_more_steps_go_on_and_keep_the_earlier_figures(tmp_path, capsys):
    """The weights and figures are those of a run that had all steps at once."""
    folder = tmp_path / "run"
    first = run(folder, SHORT)
    second = run(folder, LONG, "resume=auto")
    assert second["images"] == 9 * 16
    [end] = second["extended"]
    assert (end["steps"], end["images"], end["commit"]) == (4, 4 * 16, first["commit"])
    assert (end["metrics"], end["seconds"]) == (first["metrics"], first["seconds"])
    assert datetime.fromisoformat(end["date"]).utcoffset().total_seconds() == 0
    assert "extended" not in first
    whole = run(tmp_path / "whole", LONG)
    assert second["metrics"] == whole["metrics"]
    assert second["metrics"]["test/bpd"] != end["metrics"]["test/bpd"]
    assert same_weights(final(folder), final(tmp_path / "whole"))
    written = json.loads((folder / "result.json").read_text())
    assert written["extended"] == second["extended"]
    third = run(folder, "trainer.max_steps=11", "resume=auto")
    assert [end["steps"] for end in third["extended"]] == [4, 9]
    assert third["extended"][0] == end
    assert third["extended"][1]["metrics"] == second["metrics"]
    assert ended(folder, "trainer.max_steps=11") == 0
    assert "trainer.max_steps=11: say the same" in ended(folder, LONG)


def test_more_epochs_go_on(tmp_path):
    """An epoch has four steps."""
    folder = tmp_path / "run"
    limits = ["trainer.max_steps=-1", "trainer.max_epochs=1"]
    first = run(folder, *limits)
    more = ["trainer.max_steps=-1", "trainer.max_epochs=2"]
    second = run(folder, *more, "resume=auto")
    assert (first["images"], second["images"]) == (64, 128)
    assert [end["metrics"] for end in second["extended"]] == [first["metrics"]]
    whole = run(tmp_path / "whole", *more)
    assert second["metrics"] == whole["metrics"]
    assert same_weights(final(folder), final(tmp_path / "whole"))


def test_more_time_goes_on(tmp_path):
    folder = tmp_path / "run"
    limits = ["trainer.max_steps=-1", "trainer.max_time=00:00:00:01"]
    first = run(folder, *limits)
    assert ended(folder, *limits) == 0
    second = run(folder, limits[0], "trainer.max_time=00:00:00:02", "resume=auto")
    assert second["images"] > first["images"]
    assert [end["images"] for end in second["extended"]] == [first["images"]]


def test_more_time_for_a_run_that_has_had_all_its_steps_is_finished(tmp_path):
    run(tmp_path / "run", SHORT, "trainer.max_time=00:00:10:00")
    assert ended(tmp_path / "run", SHORT, "trainer.max_time=00:00:20:00") == 0
    assert ended(tmp_path / "run", SHORT) == 0  # without a limit of time


@pytest.mark.parametrize("setting", ["optim.schedule=cosine", "optim.cooldown_steps=2"])
def test_a_rate_that_has_fallen_to_the_last_step_cannot_go_on(tmp_path, setting):
    folder = tmp_path / "run"
    run(folder, SHORT, setting)
    assert ended(folder, SHORT, setting) == 0
    assert ended(folder, LONG, setting) == (
        f"{folder} is finished at trainer.max_steps=4, towards which {setting} lowered the "
        f"learning rate: it cannot go on; start a new run from its weights with init_from={folder},"
        " in another run_dir"
    )


def test_an_extension_that_is_killed_goes_on_bit_for_bit(tmp_path):
    """The result of the first end stays in the folder until the new end."""
    words = ["ema.decay=0.9", "checkpoint.select=last"]
    long = [*words, "trainer.max_steps=12"]
    first = Run(tmp_path / "run", *words, SHORT)
    whole = Run(tmp_path / "whole", *long)
    assert first.wait() == whole.wait() == [0], first.output() + whole.output()
    content = (tmp_path / "run" / "result.json").read_bytes()
    killed = Run(tmp_path / "run", *long, "resume=auto", kill=(9, 1))
    assert killed.wait() == [-signal.SIGKILL], killed.output()
    assert (tmp_path / "run" / "result.json").read_bytes() == content
    # The tested checkpoint, that of step 4, is removed by now. Its weights are still loaded, since
    # the result is theirs; without them the newest take their place.
    steps = [path.name for path in step_checkpoints(tmp_path / "run")]
    assert steps == ["step-00000008.ckpt", "step-00000006.ckpt"]
    tested = load(tmp_path / "run")
    assert tested.stored.path.name == "model.safetensors"
    assert tested.result == json.loads(content)
    (tmp_path / "run" / "model.safetensors").unlink()
    weights = read_checkpoint(tmp_path / "run" / "checkpoints" / steps[0])["state_dict"]
    newest = load(tmp_path / "run")
    assert newest.result is None
    for key, value in newest.flow.state_dict().items():
        assert torch.equal(value, weights[f"flow.{key}"])
    resumed = Run(tmp_path / "run", *long, "resume=auto")
    assert resumed.wait() == [0], resumed.output()
    assert resumed.losses() == whole.losses()
    assert same_weights(resumed.final(), whole.final())
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    at_once = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["metrics"] == at_once["metrics"]
    [end] = result["extended"]
    assert end["steps"] == 4
    assert end["metrics"] == json.loads(content)["metrics"]
