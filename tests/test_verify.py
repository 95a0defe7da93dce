"""`python -m reproduce.verify`: recorded rows pass, and a row that was changed is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_glow_scripts import run

import results
from reproduce import verify
from reproduce.verify import FAIL, NOTE, OK

ROWS = sorted((results.ROOT / "runs").glob("*/*.json"))
ROW = "realnvp_cifar10/cpu-seed0"
WEIGHTS = f"weights/{ROW}.safetensors"


def verdicts(path):
    """check -> (verdict, text)"""
    lines, _ = verify.checks(path)
    return {line.name: (line.verdict, line.text) for line in lines}


@pytest.fixture
def row(tmp_path):
    """A function that changes a recorded row and writes it where a clone has it."""
    content = json.loads((results.ROOT / "runs" / f"{ROW}.json").read_text())

    def changed(change=lambda content: None, name=ROW):
        change(content)
        path = tmp_path / "results" / "runs" / f"{name}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
        return path

    return changed


@pytest.mark.parametrize("path", ROWS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_committed_row_passes(path):
    lines = verdicts(path)
    failed = {name: text for name, (verdict, text) in lines.items() if verdict == FAIL}
    assert failed == {}
    assert list(lines)[:6] == ["schema", "recipe", "model", "curve", "budget", "claims"]
    assert {"speed", "commit", "weights"} <= set(lines)


def set_at(path, value):
    """A change of the value at a path such as `config.optim.lr` or `curve.3.val/bpd`."""

    def change(content):
        *parents, last = path.split(".")
        for key in parents:
            content = content[int(key) if isinstance(content, list) else key]
        content[int(last) if isinstance(content, list) else last] = value

    return change


def faked(figure):
    """A change of the tested figure, with all that follows from it."""

    def change(content):
        verdict = {"gap": figure - 3.49, "status": "reproduced"}
        content["metrics"]["test/bpd"] = figure
        content.update(verdict)
        content["comparisons"][0].update(verdict)

    return change


def remove(path):
    """A change that removes a key."""

    def change(content):
        *parents, last = path.split(".")
        for key in parents:
            content = content[key]
        del content[last]

    return change


@pytest.mark.parametrize(
    ("change", "name", "text"),
    [
        (set_at("run", "other"), "schema", "its file has to be results/runs/realnvp_ci"),
        (set_at("config.optim.lr", 0.5), "recipe", "optim.lr is 0.5 in the row, and 0.001 by the"),
        (
            remove("config.flow.hidden_channels"),
            "recipe",
            "flow.hidden_channels is 64 in the row, and 16",
        ),
        (set_at("config.flow.width", 3), "recipe", "flow.width=3 is no key of the recipe"),
        (set_at("preset", None), "recipe", "preset is null, and follows as cpu"),
        (set_at("seed", 3), "recipe", "seed is 3, and follows as 0"),
        (set_at("precision", "32-true"), "recipe", "is 32-true, and follows as bf16-mixed"),
        (set_at("overrides", ["preset=big"]), "recipe", "preset=big is not known"),
        (set_at("config.flow.hidden_channels", 24), "model", "and the row says 345,465"),
        (set_at("config.flow.n_scales", 9), "model", "this clone does not build it"),
        (set_at("parameters", 7), "model", "has 345,465 parameters, and the row says 7"),
        (set_at("curve", []), "curve", "it has fewer than two rows"),
        (set_at("curve.3.step", None), "curve", "row 3 has no number in its column step"),
        (set_at("curve.3.step", 1406), "curve", "step 1406 follows step 1406"),
        (set_at("curve.0.step", 5), "curve", "it begins at step 5, not at 0"),
        (set_at("curve.3.images", 1), "curve", "images are not steps x 64 at step 2109"),
        (set_at("curve.3.seconds", 9.0), "curve", "9.0 s follow"),
        (set_at("images", 640_000), "curve", "ends at 674,880 images, and the run at 640,000"),
        (set_at("seconds", 60.0), "curve", "it ends after 5854.8 s, and the run after 60.0 s"),
        (set_at("config.trainer.max_steps", 703), "curve", "beyond trainer.max_steps=703"),
        (set_at("curve.5.val/bpd", 3.4), "curve", "val/bpd is"),
        (set_at("metrics.val/bpd", 3.4), "curve", "val/bpd is 3.4, and by the curve"),
        (set_at("tested.step", 703), "curve", "weights of step 703 were tested, and the best are"),
        (set_at("budget.fraction", 1.0), "budget", "fraction is 1.0, and follows as 0.054"),
        (set_at("budget.of", 1000), "budget", "of is 1000, and follows as 12480000"),
        (set_at("budget", None), "budget", "there is none, and the recipe gives 12,480,000"),
        (set_at("config.budget.images", None), "budget", "the recipe gives none"),
        (set_at("metrics.test/bpd", 3.4), "claims", "status of the first claim is shortened"),
        (set_at("status", "reproduced"), "claims", "is reproduced, and follows as shortened"),
        (set_at("gap", 0.0), "claims", "gap of the first claim is 0.0, and follows as 0.51"),
        (set_at("comparisons.0.gap", 0.0), "claims", "gap of test/bpd is 0.0"),
        (set_at("papers.0.value", 4.5), "claims", "realnvp.cifar10 is 3.49, and 4.5 in the row"),
        (set_at("papers.0.comparable", False), "claims", "the row is compared with"),
        (set_at("papers.0.claim", "glow.cifar10"), "claims", "the row is compared with"),
        (faked(3.4), "curve", "test/bpd is 3.4, far better than the validation of these weights"),
        (set_at("not_measured", {"test/bpd": "no"}), "protocol", "test/bpd has a figure, and a"),
        (set_at("device", "Intel, 0 threads"), "speed", "values that cannot be read"),
    ],
)
def test_a_change_is_named(row, change, name, text):
    path = row(change)
    check = getattr(verify, f"check_{name}", None)
    if name in ("recipe", "curve", "budget", "claims", "protocol"):  # they read the row alone
        [_, verdict, line] = verify.guarded(name, lambda: check(verify.read_row(path)))
    else:
        verdict, line = verdicts(path)[name]
    assert verdict == FAIL
    assert text in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("change", "name", "text"),
    [
        (set_at("commit", "f" * 40), "commit", "ffffffffffff is not in this clone"),
        (set_at("commit", "--help"), "commit", "is not in this clone"),
        (set_at("commit", None), "commit", "none is recorded"),
        (set_at("weights", None), "weights", "none are recorded"),
        (set_at("metrics.test/fid", 40.0), "protocol", "test/fid is not said to depend on"),
    ],
)
def test_what_cannot_be_checked_is_a_note(row, change, name, text):
    verdict, line = verdicts(row(change))[name]
    assert verdict == NOTE
    assert text in line


def test_a_curve_that_is_too_fast_for_its_device_is_named(row):
    def change(content):
        for point in content["curve"]:
            point["seconds"] = round(point["step"] * 1e-4, 2)

    verdict, line = verdicts(row(change))["speed"]
    assert verdict == FAIL
    assert "% of what AMD EPYC, 1 threads can do at most" in line


def test_operations_are_those_of_the_convolutions():
    """A multiplication and an addition for each weight and pixel."""

    class Objective:
        def trial(self, n):
            return torch.nn.functional.conv2d(torch.ones(n, 3, 8, 8), torch.ones(5, 3, 1, 1))

    assert verify.operations_of(Objective()) == 2 * 3 * 5 * 8 * 8


def test_the_protocol_and_reasons_of_metrics_are_read(row):
    def change(content):
        content["metrics"]["test/fid"] = 40.0
        content["protocol"] = {"test/fid": {"n": 50_000}}
        content["not_measured"] = {"test/lpips": "no weights: give some"}

    text = "test/fid; test/lpips not measured: no weights: give some"
    assert verdicts(row(change))["protocol"] == (OK, text)


def test_keys_that_did_not_exist_yet_count_as_their_defaults(row):
    def change(content):
        for section, key in (("optim", "cooldown_steps"), ("eval", "noise_samples")):
            del content["config"][section][key]
        del content["config"]["trainer"]["recompute"]

    assert verdicts(row(change))["recipe"][0] == OK


@pytest.mark.parametrize(
    "path", ["metrics.test/bpd", "metrics.samples/finite_T1", "curve.3.val/bpd", "curve.3.lr"]
)
@pytest.mark.parametrize("value", ["3.5", True, {}, 10**400])
def test_a_figure_that_is_no_number_is_of_the_wrong_form(row, path, value):
    [(verdict, line)] = verdicts(row(set_at(path, value))).values()
    assert verdict == FAIL
    assert "lacks a usable" in line
    assert path.rpartition(".")[2] in line


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"experiment": 3}'])
def test_another_form_is_one_line(tmp_path, text):
    path = tmp_path / "row.json"
    path.write_text(text)
    [(verdict, line)] = verdicts(path).values()
    assert verdict == FAIL
    assert line.startswith(f"{path} ")


@pytest.mark.parametrize(
    ("name", "text"), [("verify", "verify.yaml is missing"), ("base", "base.yaml has no data")]
)
def test_a_recipe_that_is_not_here_is_named(row, name, text):
    lines = verdicts(row(set_at("experiment", name), name=f"{name}/cpu-seed0"))
    assert text in lines["recipe"][1]
    assert "model" not in lines  # no code of that name is run


# Weights


def test_weights_beside_a_strangers_row_are_checked(row, tmp_path):
    path = row()
    file = tmp_path / "results" / WEIGHTS
    file.parent.mkdir(parents=True)
    shutil.copy(results.ROOT / WEIGHTS, file)
    assert verdicts(path)["weights"] == (
        OK,
        "cpu-seed0.safetensors, 345,465 parameters of the flow",
    )
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "is not the file with the recorded SHA-256 1c23488f" in verdicts(path)["weights"][1]


def given(path, file):
    """The verdict on a file of weights that is given on the command line."""
    lines, model = verify.checks(path, str(file))
    return lines[-1].verdict, lines[-1].text, model


def test_other_weights_are_named(row, tmp_path):
    path = row(set_at("weights", None))
    verdict, text, model = given(path, results.ROOT / WEIGHTS)
    assert verdict == NOTE
    assert text.endswith("; the row records no SHA-256")
    assert model is not None
    verdict, text, _ = given(path, results.ROOT / "weights/glow_cifar10/cpu-seed0.safetensors")
    assert verdict == FAIL
    assert "its experiment is glow_cifar10, and that of the row realnvp_cifar10" in text
    assert given(path, tmp_path / "none")[:2] == (FAIL, f"no file {tmp_path / 'none'}")
    tensors = load_file(results.ROOT / WEIGHTS)
    tensors["flow.extra"] = torch.zeros(2)
    save_file(tensors, tmp_path / "bare.safetensors")
    assert "does not say which model it is of" in given(path, tmp_path / "bare.safetensors")[1]


# The command


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run("realnvp_photos", folder, "eval.bn_images=32")
    return folder


def test_a_finished_run_is_tested_again(finished, capsys):
    verify.main([str(finished), "data.num_workers=0"])
    lines = capsys.readouterr().out.splitlines()
    names = [
        "schema",
        "recipe",
        "model",
        "curve",
        "budget",
        "claims",
        "protocol",
        "speed",
        "commit",
    ]
    assert [line.split()[1] for line in lines] == [*names, "weights", "figure"]
    assert [line.split()[0] for line in lines if line.split()[0] == FAIL] == []
    assert "test/bpd: " in lines[-1]
    assert "equal to the last digit" in lines[-1]


def test_a_figure_that_the_weights_do_not_have_fails(finished, capsys, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    result = json.loads((folder / "result.json").read_text())
    result["metrics"]["test/bpd"] -= 0.5
    (folder / "result.json").write_text(json.dumps(result))
    with pytest.raises(SystemExit) as stop:
        verify.main([str(folder), "data.num_workers=0"])
    assert stop.value.code == (f"error: {folder / 'result.json'}: 1 of 11 checks failed: figure")
    assert "more than rounding" in capsys.readouterr().out.splitlines()[-1]


def test_a_test_on_other_settings_is_a_note(finished, capsys):
    verify.main([str(finished), "data.n_test=16"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == "note  figure   not compared: data.n_test=16 makes another test"


def test_figures_of_samples_are_tested_again_or_named(finished, capsys, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    result = json.loads((folder / "result.json").read_text())
    result["metrics"] |= {"test/fid": 40.0, "test/precision": 0.5, "test/psnr": 20.0}
    result["protocol"] = {"test/fid": {"n": 16}, "test/precision": {"n": 8}}
    (folder / "result.json").write_text(json.dumps(result))
    verify.main([str(folder), "data.num_workers=0"])
    texts = capsys.readouterr().out.splitlines()[-1].split("; ")
    assert texts[-3:] == [
        "test/fid: not tested again: give quality.n=16",
        "test/precision: not tested again: give quality.n=16",
        "test/psnr: not tested again",
    ]
    weights = tmp_path / "none.pth"
    with pytest.raises(SystemExit) as stop:
        verify.main([str(folder), "quality.n=16", f"metrics.inception_weights={weights}"])
    assert stop.value.code.endswith("checks failed: figure")
    line = capsys.readouterr().out.splitlines()[-1]
    assert "metrics.inception_weights: " in line
    assert "none.pth is no file" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "error: JSON is missing: give JSON, and see --help"),
        (["nowhere.json"], "error: no file nowhere.json: give a recorded run"),
        ([ROW, "wieghts=a"], "error: wieghts is not a known key (did you mean weights?)"),
    ],
)
def test_a_mistake_is_one_line(words, message):
    with pytest.raises(SystemExit) as stop:
        verify.main(words)
    assert stop.value.code.startswith(message)
    assert "\n" not in stop.value.code


def test_without_data_the_figure_is_not_tested_again_and_a_line_says_so(capsys):
    verify.main([ROW])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == "note  figure   not tested again: give data.root=FOLDER, where the data are"


def test_without_weights_a_figure_cannot_be_tested(capsys):
    with pytest.raises(SystemExit) as stop:
        verify.main(["realnvp_moons/seed0", "data.num_workers=0"])
    assert stop.value.code.endswith("seed0.json: 1 of 11 checks failed: figure")
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == "FAIL  figure   there are no weights to test"


def test_a_row_whose_data_are_not_here_is_checked_without_its_model(row, monkeypatch):
    def missing(**section):
        raise FileNotFoundError(f"there is no folder {section['root']}")

    monkeypatch.setattr(verify, "make_data", missing)
    lines = verdicts(row())
    text = "not built, since the data are not here (there is no folder data)"
    assert lines["model"] == (NOTE, text)
    assert "speed" not in lines
    assert lines["curve"][0] == OK


def test_help_names_every_key_and_check(capsys):
    verify.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {key}=" in text for key in verify.DEFAULTS)
    for name in ("schema", "recipe", "model", "curve", "budget", "claims", "protocol", "figure"):
        assert f"\n  {name} " in text
