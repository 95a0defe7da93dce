"""What a run leaves for W&B, read from the real .wandb file, and how it does without W&B."""

import contextlib
import csv
import glob
import http.server
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import cases
import numpy as np
import pytest
import torch
import wandb
from omegaconf import OmegaConf
from PIL import Image
from wandb_file import parts_of

from lightning_modules.callbacks import throughput
from reproduce import load, loggers, realnvp_cifar10
from reproduce.config import ConfigError, compose, override
from reproduce.loggers import close, make_logger, mark_preempting, report
from reproduce.provenance import git_state
from reproduce.run_folder import read_checkpoint
from reproduce.sweep import FACTS

BATCH = 16
TINY = override(cases.TINY, ["logger.name=wandb", "trainer.log_every_n_steps=2"])
RESULT = {  # of a run on the claim's own data
    "experiment": "realnvp_cifar10",
    "metrics": {
        "test/bpd": 3.6,
        "test/bpd_reestimated": float("nan"),
        "val/bpd": 3.5,
        "samples/finite_T1": 1.0,
    },
    "comparisons": [
        {"metric": "test/bpd", "value": 3.49, "decimals": 2, "gap": 0.11, "status": "shortened"}
    ],
    "tested": {"chosen": "best"},
    "gap": 0.11,
    "status": "shortened",
}


@contextlib.contextmanager
def nobody_logged_in(home):
    """No W&B login, no settings of whoever runs the tests.

    wandb reads the environment afresh.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "NETRC",
            "WANDB_API_KEY",
            "WANDB_BASE_URL",
            "WANDB_IDENTITY_TOKEN_FILE",
            "WANDB_MODE",
            "WANDB_DIR",
            "WANDB_RUN_ID",
            "WANDB_SWEEP_ID",
            "WANDB_PROJECT",
        ):
            patch.delenv(name, raising=False)
        patch.setenv("HOME", str(home))
        wandb.teardown()
        yield patch
    wandb.teardown()


@pytest.fixture
def alone(tmp_path):
    with nobody_logged_in(tmp_path) as patch:
        yield patch


def config_for(folder, *arguments):
    return OmegaConf.merge(
        compose("realnvp_cifar10", override(TINY, arguments)), {"run_dir": str(folder)}
    )


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run of 4 steps that went on to 7 in the same folder: folder, both outputs, both results."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    outputs = []
    results = []
    for steps in (4, 7):
        out = io.StringIO()
        err = io.StringIO()
        with (
            nobody_logged_in(folder.parent),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            arguments = [f"run_dir={folder}", f"trainer.max_steps={steps}", "resume=auto"]
            weights = f"logger.weights={str(steps == 7).lower()}"
            results.append(realnvp_cifar10.main(override(TINY, [*arguments, weights])))
        outputs.append((out.getvalue(), err.getvalue()))
        if steps == 4:  # else the run would count as finished
            (folder / "result.json").rename(folder / "result-4.json")
    return SimpleNamespace(folder=folder, outputs=outputs, results=results, parts=parts_of(folder))


def test_curves_are_the_curve_over_steps_and_images(resumed):
    with (resumed.folder / "curve.csv").open() as file:
        curve = {int(row["step"]): row for row in csv.DictReader(file)}
    rows = [row for part in resumed.parts for row in part.rows]
    val = {row["trainer/global_step"]: row["val/bpd"] for row in rows if "val/bpd" in row}
    assert {3, 6} <= set(val)
    assert val == {step: float(row["val/bpd"]) for step, row in curve.items() if row["val/bpd"]}
    assert all(row["trainer/images"] == BATCH * row["trainer/global_step"] for row in rows)
    train = {row["trainer/global_step"]: row["train/bpd"] for row in rows if "train/bpd" in row}
    assert {2, 4, 6} <= set(train)
    assert all(2 < value < 20 for value in train.values())
    assert {row["lr-Adam"] for row in rows if "lr-Adam" in row} == {1e-3}


def test_rows_have_the_seconds_of_the_run_and_training_rows_its_speed(resumed):
    """Seconds go on from the checkpoint after a resume, as in curve.csv."""
    with (resumed.folder / "curve.csv").open() as file:
        curve = {int(row["step"]): float(row["seconds"]) for row in csv.DictReader(file)}
    first, second = ([row["trainer/seconds"] for row in part.rows] for part in resumed.parts)
    assert first == sorted(first)
    assert second == sorted(second)
    assert second[0] >= curve[3]
    rows = [row for part in resumed.parts for row in part.rows]
    for row in rows:
        step = row["trainer/global_step"]
        if step in curve and "val/bpd" in row and step > 0:
            assert curve[step] <= row["trainer/seconds"] < curve[step] + 30
    speeds = {
        row["trainer/global_step"]: row["trainer/images_per_second"]
        for row in rows
        if "trainer/images_per_second" in row
    }
    assert set(speeds) == {2, 4, 6}  # every second step
    assert all(speed > BATCH / 30 for speed in speeds.values())


def test_the_speed_is_that_of_training_without_validations(monkeypatch):
    seconds = iter([100.0, 105.0, 125.0, 130.0, 200.0])
    monkeypatch.setattr(throughput.time, "monotonic", lambda: next(seconds))
    trainer = SimpleNamespace(global_step=3, log_every_n_steps=4, accumulate_grad_batches=2)
    logged = []
    module = SimpleNamespace(log=lambda key, value: logged.append((trainer.global_step, value)))
    callback = throughput.Throughput(BATCH)
    callback.on_train_start(trainer, module)  # second 100, as a run that goes on
    for step, batch_idx in ((3, 0), (4, 1), (4, 2), (5, 3)):
        if (step, batch_idx) == (4, 1):
            callback.on_validation_start(trainer, module)  # 105
        callback.on_train_batch_start(trainer, module, None, batch_idx)  # 125, after it
        trainer.global_step = step
        callback.on_train_batch_end(trainer, module, None, None, batch_idx)  # 130
    assert logged == [(4, BATCH / 10)]  # 30 seconds, of which 20 were no training


def test_one_row_a_step_also_over_the_parts_of_a_run(resumed):
    """W&B orders and merges rows by _step, which it begins anew in every offline part."""
    first, second = ([row["_step"] for row in part.rows] for part in resumed.parts)
    assert first == sorted(set(first))
    assert first == [row["trainer/global_step"] for row in resumed.parts[0].rows]
    assert second == [row["trainer/global_step"] for row in resumed.parts[1].rows]
    assert first[0] == 0
    assert first[-1] == 4 <= second[0]
    assert second[-1] == 7


def test_summary_is_what_was_tested(resumed):
    for part, result in zip(resumed.parts, resumed.results, strict=True):
        summary = part.summary
        metrics = result["metrics"]
        assert summary["test/bpd"] == metrics["test/bpd"]
        assert summary["test/bpd_reestimated"] == metrics["test/bpd_reestimated"]
        assert summary["best/val/bpd"] == metrics["val/bpd"]
        assert isinstance(summary["val/bpd"], float)
        assert summary["status"] == "-"
        assert not any(
            key.startswith(("paper/", "gap/")) for key in summary
        )  # photographs beside CIFAR-10's number


def test_config_group_name_and_tags(resumed):
    commit, _ = git_state()
    for part in resumed.parts:
        assert part.config["flow"] == {
            "n_scales": 2,
            "hidden_channels": 4,
            "n_blocks": 1,
            "alpha": 0.05,
        }
        assert part.config["experiment"] == "realnvp_cifar10"
        assert part.config["optim"]["lr"] == 1e-3
        assert (part.run.run_group, part.run.display_name, part.run.project) == (
            "realnvp_cifar10", "a run", "paperflows",
        )  # fmt: skip
        tags = [f"commit-{commit[:7]}", "demo"] if commit else ["demo"]
        assert list(part.run.tags) == tags


def test_config_tells_where_the_numbers_come_from(resumed):
    for part, result in zip(resumed.parts, resumed.results, strict=True):
        facts = {key: part.config[key] for key in FACTS}
        assert facts == {key: result[key] for key in FACTS}
        assert facts["parameters"] == 18_701
        assert facts["versions"]["torch"] == metadata.version("torch")
        assert "threads" in facts["device"]


def test_weights_are_an_artifact_where_asked_for(resumed, tmp_path):
    """Its files are a folder from which the tested weights load."""
    first, second = resumed.parts
    assert models_of(first) == []
    [artifact] = models_of(second)
    assert artifact.name == f"realnvp_cifar10-{second.run.run_id}"
    metrics = resumed.results[1]["metrics"]
    assert json.loads(artifact.metadata)["test/bpd"] == metrics["test/bpd"]
    names = {entry.path for entry in artifact.manifest.contents}
    assert names == {"model.safetensors", "result.json", "config.yaml"}
    for entry in artifact.manifest.contents:
        (tmp_path / entry.path).write_bytes(Path(entry.local_path).read_bytes())
        assert Path(entry.local_path).is_relative_to(resumed.folder)  # and no copy in the home
    weights = read_checkpoint(resumed.folder / "checkpoints" / "best.ckpt")["state_dict"]
    loaded = load(tmp_path).flow.state_dict()
    assert loaded
    assert all(torch.equal(value, weights[f"flow.{key}"]) for key, value in loaded.items())


def models_of(part):
    return [record for record in part.records.get("artifact", []) if record.type == "model"]


def test_table_holds_the_printed_rows(resumed):
    part = resumed.parts[1]
    result = resumed.results[1]
    (path,) = (part.folder / "files" / "media" / "table").glob("comparison_*.table.json")
    table = json.loads(path.read_text())
    columns = ["experiment", "metric", "paper", "ours", "gap", "status", "note"]
    assert table["columns"] == columns
    metrics = result["metrics"]
    assert table["data"] == [
        ["realnvp_cifar10", "test/bpd", None, metrics["test/bpd"], None, "-", ""],
        [
            "realnvp_cifar10",
            "test/bpd_reestimated",
            None,
            metrics["test/bpd_reestimated"],
            None,
            "-",
            "",
        ],
    ]


def test_pictures_are_those_of_the_run_folder(resumed):
    shown = {}
    for part in resumed.parts:
        for row in part.rows:
            for key in [key for key in row if key.endswith(".filenames")]:
                name = key.removesuffix(".filenames").split("/")[1]
                [path] = row[key]
                shown[f"{name}-{row['trainer/global_step']:07d}.png"] = pixels(
                    part.folder / "files" / path
                )
    written = {path.name: pixels(path) for path in (resumed.folder / "samples").iterdir()}
    assert set(shown) == set(written)
    assert {"samples-0000003.png", "reconstruction-0000007.png"} <= set(shown)
    for name, picture in shown.items():
        assert picture.dtype == np.uint8
        assert np.array_equal(picture, written[name])
    assert shown["reconstruction-0000007.png"].std() > 20
    assert shown["reconstruction-0000007.png"].max() > 200


def test_pictures_have_captions(resumed):
    captions = {}
    for row in [row for part in resumed.parts for row in part.rows]:
        for name in ("samples", "reconstruction"):
            if f"pictures/{name}.captions" in row:
                [captions[name, row["trainer/global_step"]]] = row[f"pictures/{name}.captions"]
    assert captions["samples", 3] == "step 3, samples at T=0.5, T=0.7, T=0.9, T=1 from the top"
    assert captions["reconstruction", 7] == ("step 7, validation data above, reconstructions below")


def test_a_resumed_run_is_the_same_at_wandb(resumed):
    kept = (resumed.folder / "wandb-run-id.txt").read_text().strip()
    assert len(kept) == 16
    assert [part.run.run_id for part in resumed.parts] == [kept, kept]
    assert [part.records["exit"][0].exit_code for part in resumed.parts] == [0, 0]


def test_another_folder_is_another_run(tmp_path, alone):
    for name in ("a", "b"):
        make_logger(config_for(tmp_path / name))
    first, second = ((tmp_path / name / "wandb-run-id.txt").read_text() for name in ("a", "b"))
    assert first != second


def test_the_upload_is_named_once_and_takes_every_part(resumed):
    for output, errors in resumed.outputs:
        (line,) = [line for line in output.splitlines() if "wandb sync" in line]
        assert str(resumed.folder) in line
        assert "anonymous" not in output + errors
    program, _, pattern = shlex.split(line[line.index("wandb sync") :])
    assert program == "wandb"
    paths = sorted(glob.glob(pattern))
    assert paths == [str(part.folder) for part in resumed.parts]
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run", *paths]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=resumed.folder, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    listed = done.stdout + done.stderr
    assert all(part.folder.name in listed for part in resumed.parts), listed


# --------------------------------------------------------------------------- without training


def test_a_mode_that_wandb_has_not_is_one_line(tmp_path, alone, monkeypatch):
    """wandb's own answer is four lines that do not name the variable."""
    monkeypatch.setenv("WANDB_MODE", "garbage")
    with pytest.raises(ConfigError) as refusal:
        make_logger(config_for(tmp_path / "run"))
    line = "WANDB_MODE=garbage in the environment is not known: give one of online, offline,"
    assert str(refusal.value).startswith(line)


@pytest.mark.parametrize("key", ["abc", f"local-{'a' * 39}", "a b"])
def test_a_key_that_is_too_short_is_one_line(tmp_path, alone, key):
    alone.setenv("WANDB_API_KEY", key)
    with pytest.raises(ConfigError) as refusal:
        make_logger(config_for(tmp_path / "run"))
    n = len(key.removeprefix("local-"))
    assert str(refusal.value) == (
        f"WANDB_API_KEY in the environment has {n} characters, and a key of W&B at least 40: "
        "run unset WANDB_API_KEY and wandb login, or add logger.name=csv"
    )
    alone.setenv("WANDB_MODE", "offline")  # where no key is needed
    assert make_logger(config_for(tmp_path / "run")).settings.mode == "offline"


@pytest.mark.parametrize("key", ["a" * 40, f"local-{'a' * 40}", "wandb_v1_" + "a" * 77, "a.b.c"])
def test_keys_of_all_forms_are_taken(alone, key):
    alone.setenv("WANDB_API_KEY", key)
    loggers._check_key()


def test_weights_without_wandb_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"logger\.name=csv does not: give logger\.name=wandb$"):
        make_logger(config_for(tmp_path / "run", "logger.name=csv", "logger.weights=true"))


def test_a_preempted_run_says_so_and_keeps_its_exit_code(tmp_path, alone, capsys):
    assert make_logger(config_for(tmp_path / "run")).experiment.offline
    mark_preempting()
    close(75)
    (part,) = parts_of(tmp_path / "run")
    assert len(part.records["preempting"]) == 1
    assert part.records["exit"][0].exit_code == 75
    assert capsys.readouterr().out.count("wandb sync") == 1
    assert wandb.run is None


def test_a_stop_by_wandb_is_no_preemption(tmp_path, alone):
    """It is early_terminate, or a button on the run's page; the sweep shall not start it again."""
    received = []
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        run = make_logger(config_for(tmp_path / "run")).experiment
        thread = threading.Thread(
            target=run.settings.stop_fn
        )  # wandb calls it in a thread of its own
        thread.start()
        thread.join()
        mark_preempting()
        close(75)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]  # the run saves and leaves as it does for Slurm
    (part,) = parts_of(tmp_path / "run")
    assert "preempting" not in part.records
    assert part.records["exit"][0].exit_code == 75


@pytest.mark.parametrize(("wants_stop", "seconds"), [(True, 5.0), (False, 0.05)])
def test_in_a_sweep_the_agents_sigterm_waits_for_word_from_wandb(monkeypatch, wants_stop, seconds):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    marked = []
    run = SimpleNamespace(offline=False, mark_preempting=lambda: marked.append("preempting"))
    monkeypatch.setattr(loggers, "_active_run", lambda: run)
    monkeypatch.setattr(loggers, "STOP_WITHIN", seconds)
    loggers._stop_wanted.clear()
    timer = threading.Timer(0.1, loggers._stop_wanted.set)
    if wants_stop:
        timer.start()
    mark_preempting()
    loggers._stop_wanted.clear()
    assert marked == ["preempting"] * (not wants_stop)


def test_without_a_run_nothing_happens(monkeypatch, capsys, tmp_path):
    assert wandb.run is None
    mark_preempting()
    close(75)
    monkeypatch.delitem(sys.modules, "wandb")
    mark_preempting()
    close(0)
    report(None, RESULT)
    report(make_logger(config_for(tmp_path, "logger.name=csv")), RESULT)
    assert make_logger(config_for(tmp_path, "logger.name=none")) is False
    assert "wandb" not in sys.modules
    assert capsys.readouterr().out == ""
    assert not list(Path(tmp_path).iterdir())


def test_report_sets_the_tested_gap_over_the_last_validations(tmp_path, alone):
    logger = make_logger(config_for(tmp_path / "run"))
    logger.log_metrics({"gap/bpd": 9.0, "val/bpd": 12.49, "paper/bpd": 3.49}, step=8)
    report(logger, RESULT)
    close(0)
    (part,) = parts_of(tmp_path / "run")
    summary = part.summary
    assert (summary["paper/bpd"], summary["gap/bpd"], summary["status"]) == (
        3.49,
        0.11,
        "shortened",
    )
    assert (summary["best/val/bpd"], summary["val/bpd"]) == (3.5, 12.49)
    assert summary["test/bpd_reestimated"] is None  # not a number
    assert list(part.run.tags)[-1] == "shortened"
    assert part.rows[-1]["trainer/images"] == 8 * BATCH
    (path,) = (part.folder / "files" / "media" / "table").iterdir()
    assert json.loads(path.read_text())["data"][0] == [
        "realnvp_cifar10",
        "test/bpd",
        3.49,
        3.6,
        0.11,
        "shortened",
        "",
    ]


def test_report_of_several_claims(tmp_path, alone):
    logger = make_logger(config_for(tmp_path / "run"))
    psnr = {
        "metric": "test/psnr",
        "value": 27.75,
        "decimals": 2,
        "gap": 0.25,
        "status": "reproduced",
    }
    ssim = {
        "metric": "test/ssim",
        "value": 0.76,
        "decimals": 2,
        "gap": None,
        "status": "not measured",
        "differences": [],
    }
    again = {"metric": "test/mse", "value": 1.0, "decimals": 2, "gap": 0.5, "status": "shortened"}
    metrics = RESULT["metrics"] | {"test/psnr": 28.0, "test/mse": 1.5}
    comparisons = [*RESULT["comparisons"], psnr, ssim, again]
    more = {"not_measured": {"test/ssim": "no images: give some", "test/kid": "no weights"}}
    report(logger, RESULT | {"metrics": metrics, "comparisons": comparisons} | more)
    close(0)
    (part,) = parts_of(tmp_path / "run")
    summary = part.summary
    assert (summary["paper/bpd"], summary["gap/bpd"], summary["status"]) == (
        3.49,
        0.11,
        "shortened",
    )
    assert (summary["paper/psnr"], summary["gap/psnr"]) == (27.75, 0.25)
    assert (summary["paper/ssim"], "gap/ssim" in summary) == (0.76, False)
    assert list(part.run.tags)[-3:] == ["shortened", "reproduced", "not measured"]
    (path,) = (part.folder / "files" / "media" / "table").iterdir()
    rows = {row[1]: row[2:] for row in json.loads(path.read_text())["data"]}
    assert rows["test/psnr"] == [27.75, 28.0, 0.25, "reproduced", ""]
    assert rows["test/ssim"] == [0.76, None, None, "not measured", "no images: give some"]
    assert rows["test/kid"] == [None, None, None, "not measured", "no weights"]
    assert (summary["note/ssim"], summary["note/kid"]) == ("no images: give some", "no weights")


def test_the_last_weights_are_not_called_best(tmp_path, alone):
    logger = make_logger(config_for(tmp_path / "run"))
    report(
        logger,
        RESULT | {"tested": {"chosen": "step"}, "comparisons": [], "gap": None, "status": "-"},
    )
    close(0)
    (part,) = parts_of(tmp_path / "run")
    assert not {key for key in part.summary if key.startswith(("best/", "paper/", "gap/"))}
    assert part.summary["test/bpd"] == 3.6


# ----------------------------------------------------------------------- without a server, or wandb


def log_in(patch, address, answer_within=10.0):
    """As somebody with a key for W&B's server at host:port."""
    patch.setenv("WANDB_API_KEY", "a" * 40)
    patch.setenv("WANDB_BASE_URL", f"http://{address[0]}:{address[1]}")
    patch.setattr(loggers, "ANSWER_WITHIN", answer_within)
    patch.setattr(loggers, "INIT_WITHIN", 2.0)


def offline_lines(caplog):
    return [line for line in caplog.messages if line.endswith(": this run is logged offline")]


@pytest.fixture
def closed_port():
    """An address where nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()


@pytest.fixture
def silent_port():
    """An address where somebody listens and never answers, as behind many a firewall."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()


@pytest.fixture
def strange_server():
    """A web server that knows no W&B."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address
        server.shutdown()


@pytest.mark.parametrize("address", ["closed_port", "silent_port"])
def test_without_an_answer_the_run_is_offline_and_says_so(
    tmp_path, alone, caplog, request, address
):
    """A cluster's node with a login and no internet: wandb alone waits for minutes, then raises."""
    caplog.set_level("INFO")
    log_in(alone, request.getfixturevalue(address), answer_within=0.5)
    begin = time.monotonic()
    logger = make_logger(config_for(tmp_path / "run"))
    assert time.monotonic() - begin < 5
    assert logger.settings.mode == "offline"
    [line] = offline_lines(caplog)
    assert line.startswith("W&B: http://127.0.0.1:")
    assert "does not answer" in line


def test_a_server_that_refuses_the_run_leaves_it_offline(
    tmp_path, alone, caplog, strange_server, capsys
):
    caplog.set_level("INFO")
    log_in(alone, strange_server)
    logger = make_logger(config_for(tmp_path / "run"))
    assert logger.settings.mode == "online"
    logger.log_metrics({"val/bpd": 4.0}, step=3)
    [line] = offline_lines(caplog)
    assert line.startswith("W&B: ")
    assert len(line) < 200
    close(0)
    assert "W&B was offline; upload this run with: wandb sync" in capsys.readouterr().out
    part = parts_of(tmp_path / "run")[-1]
    assert [row["val/bpd"] for row in part.rows] == [4.0]


def test_where_wandb_does_not_start_at_all_one_line_names_another_logger(
    tmp_path, alone, monkeypatch
):
    def refuse(**arguments):
        raise wandb.Error("no wandb-core\nfor this machine")

    monkeypatch.setattr(wandb, "init", refuse)
    logger = make_logger(config_for(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"no wandb-core.: add logger\.name=csv$"):
        logger.log_metrics({"val/bpd": 4.0}, step=3)


def kill_wandb():
    """The process that wandb has started for this one."""
    own = f"port-{os.getpid()}.txt"
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if own in (folder / "cmdline").read_text():
                os.kill(int(folder.name), signal.SIGKILL)
                time.sleep(0.5)
                return
    raise AssertionError("wandb has no process of its own")


def test_a_run_goes_on_without_a_wandb_that_was_killed(tmp_path, alone, caplog, capsys):
    """Also to its end, and the next run of this process has its own."""
    caplog.set_level("INFO")
    logger = make_logger(config_for(tmp_path / "run"))
    logger.log_metrics({"val/bpd": 4.0}, step=3)
    kill_wandb()
    logger.log_metrics({"val/bpd": 3.9}, step=6)
    logger.log_hyperparams({"seed": 1})
    report(logger, RESULT)
    mark_preempting()
    close(0)
    lines = [line for line in caplog.messages if line.endswith("this run continues without it")]
    assert len(lines) == 1
    assert lines[0].startswith("W&B has failed (")
    output = capsys.readouterr()
    assert "Traceback" not in output.out + output.err
    other = make_logger(config_for(tmp_path / "other"))
    other.log_metrics({"val/bpd": 3.8}, step=3)
    close(0)
    [part] = parts_of(tmp_path / "other")
    assert [row["val/bpd"] for row in part.rows] == [3.8]


def test_a_wandb_that_dies_at_the_end_ends_nothing(tmp_path, alone, caplog):
    caplog.set_level("INFO")
    make_logger(config_for(tmp_path / "run")).log_metrics({"val/bpd": 4.0}, step=3)
    kill_wandb()
    close(0)
    assert wandb.run is None
    assert "this run continues without it" in caplog.text
    n_lines = len(caplog.messages)
    for stream in (sys.stdout, sys.stderr):
        print("a later line of the program", file=stream)
    time.sleep(0.5)  # wandb would send it from a thread of its own
    assert len(caplog.messages) == n_lines


def test_where_the_home_is_read_only_wandb_writes_into_the_run(tmp_path, alone):
    """Its table of the comparison, and its own log, would go to the home."""
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        alone.setenv(name, "")  # so that what make_logger sets is taken back
        alone.delenv(name)
    alone.setenv("HOME", "/proc/self")  # read-only, for root too
    logger = make_logger(config_for(tmp_path / "run"))
    report(logger, RESULT)
    close(0)
    [part] = parts_of(tmp_path / "run")
    assert part.summary["status"] == "shortened"
    assert (tmp_path / "run" / "wandb" / "cache").is_dir()


@pytest.mark.parametrize("host", ["api.wandb.ai", "wandb.example.org:8080"])
def test_a_login_is_looked_up_for_the_server_in_use(tmp_path, alone, host):
    alone.setenv("WANDB_BASE_URL", f"https://{host}")
    server = wandb.setup().settings.base_url
    assert not loggers._logged_in(server)
    write_login(tmp_path, host)
    assert loggers._logged_in(server)


def test_a_server_that_is_named_without_a_login_is_named(tmp_path, alone, caplog, strange_server):
    """wandb's own server is not: nobody may have thought of W&B at all."""
    caplog.set_level("INFO")
    host = f"127.0.0.1:{strange_server[1]}"
    assert loggers._mode() == "offline"
    assert offline_lines(caplog) == []
    alone.setenv("WANDB_BASE_URL", f"http://{host}")
    wandb.teardown()
    assert loggers._mode() == "offline"
    assert offline_lines(caplog) == [
        f"W&B: nobody is logged in; wandb login --host=http://{host} does it: "
        "this run is logged offline"
    ]
    write_login(tmp_path, host)
    assert loggers._mode() == "online"


def test_a_login_is_looked_up_where_wandb_does(tmp_path, alone):
    """A file that others can read counts too, $NETRC names another one, and a token is a login."""
    server = wandb.Settings().base_url
    write_login(tmp_path, "api.wandb.ai")
    (tmp_path / ".netrc").chmod(0o644)
    assert loggers._logged_in(server)
    (tmp_path / ".netrc").rename(tmp_path / "logins")
    assert not loggers._logged_in(server)
    with alone.context() as patch:
        patch.setenv("NETRC", str(tmp_path / "logins"))
        assert loggers._logged_in(server)
    alone.setenv("WANDB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    assert loggers._logged_in(server)


def test_no_other_rank_starts_wandb(tmp_path, alone):
    def setup():
        raise AssertionError("wandb was started")

    alone.setenv("WANDB_API_KEY", "a" * 40)
    alone.setattr(wandb, "setup", setup)
    alone.setattr(loggers.rank_zero_only, "rank", 1)
    assert loggers._mode() == "offline"
    alone.setattr(loggers.rank_zero_only, "rank", 0)
    alone.setenv("WANDB_MODE", "offline")
    assert loggers._mode() == "offline"


def test_a_password_in_the_servers_address_is_not_printed(alone, closed_port, caplog):
    caplog.set_level("INFO")
    alone.setenv("WANDB_API_KEY", "a" * 40)
    alone.setenv("WANDB_BASE_URL", f"http://me:secret@{closed_port[0]}:{closed_port[1]}")
    assert loggers._mode() == "offline"
    assert [str(closed_port[1]) in line for line in offline_lines(caplog)] == [True]
    assert "secret" not in caplog.text


def test_what_answers_without_http_is_no_server_and_no_traceback(alone):
    tracebacks = []
    alone.setattr(threading, "excepthook", tracebacks.append)
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer_as_ssh, args=(server,))
        thread.start()
        assert not loggers._answers(f"http://127.0.0.1:{server.getsockname()[1]}")
        thread.join()
    alone.setenv("http_proxy", "http://me:secret@proxy:port")
    assert not loggers._answers("http://wandb.example.org")
    assert tracebacks == []


def answer_as_ssh(server):
    connection, _ = server.accept()
    with connection:
        connection.recv(100)
        connection.sendall(b"SSH-2.0\r\n")


def write_login(home, host):
    path = home / ".netrc"
    path.write_text(f"machine {host}\n  login user\n  password {'a' * 40}\n")
    path.chmod(0o600)


def test_a_login_of_wandbs_cloud_counts_for_its_default_server_alone(tmp_path, alone):
    """wandb would ask for the key of another server."""
    write_login(tmp_path, "api.wandb.ai")
    assert loggers._logged_in(wandb.Settings().base_url)
    assert not loggers._logged_in("https://wandb.example.org")


# ---------------------------------------------------------------------------------- sweeps


def test_in_a_sweep_the_run_is_the_agents(tmp_path, alone):
    """The id is WANDB_RUN_ID, whatever the folder held, and the run belongs to the sweep."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "wandb-run-id.txt").write_text("another\n")
    alone.setenv("WANDB_SWEEP_ID", "abcd1234")
    alone.setenv("WANDB_RUN_ID", "efgh5678")
    make_logger(config_for(folder)).experiment  # noqa: B018
    close(0)
    (part,) = parts_of(folder)
    assert (part.run.run_id, part.run.sweep_id) == ("efgh5678", "abcd1234")
    assert (folder / "wandb-run-id.txt").read_text() == "efgh5678\n"
    with pytest.raises(ConfigError, match=r"add logger\.name=wandb to its command"):
        make_logger(config_for(folder, "logger.name=csv"))
    alone.delenv("WANDB_SWEEP_ID")
    make_logger(config_for(folder))
    assert (folder / "wandb-run-id.txt").read_text() == "efgh5678\n"
