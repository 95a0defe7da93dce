"""The ablation as one command: which runs it starts, how it goes on, what it refuses and writes.

Nothing is trained here.
"""

import io
import json
import math
import shlex
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from reproduce import figure3
from reproduce.config import compose
from results import figure3 as figure3_results

NAMES = [f"{p}-{c}" for c in ("additive", "affine") for p in ("reverse", "shuffle", "invertible")]
BETTER = {"reverse": 0.0, "shuffle": 0.02, "invertible": 0.05, "additive": 0.0, "affine": 0.1}
DIVERGES = "error: stopped at step 300: the loss or its gradient was not finite in 21 steps"
CURVE = """step,images,seconds,lr,train/bpd,val/bpd
0,0,1.0,0.0,,8.0
2,64,3.0,0.1,4.1,{}
4,128,{},0.1,4.0,{}
"""
SECONDS = {"reverse": 5.0, "shuffle": 5.0, "invertible": 5.5}


def value(words, key):
    return next((word.partition("=")[2] for word in words if word.startswith(f"{key}=")), None)


@pytest.fixture
def script(monkeypatch, tmp_path):
    """A stand-in for reproduce/glow_cifar10.py.

    `calls` are its arguments; `ends[n]` is raised in the n-th call.
    """
    fake = SimpleNamespace(calls=[], ends={}, bpd={})

    def main(words):
        fake.calls.append(words)
        end = fake.ends.get(len(fake.calls))
        if end is not None and str(end) != DIVERGES:
            raise end
        permutation = value(words, "flow.permutation")
        coupling = value(words, "flow.coupling")
        folder = tmp_path / value(words, "run_dir")
        seed = int(value(words, "seed"))
        bpd = 3.8 - BETTER[permutation] - BETTER[coupling] + 0.01 * seed
        bpd = fake.bpd.get(folder.name, bpd)
        result = {
            "experiment": "glow_cifar10", "run": folder.name, "preset": value(words, "preset"),
            "overrides": [word for word in words if not word.startswith(("run_dir=", "resume="))],
            "metrics": {"test/bpd": bpd, "val/bpd": bpd}, "paper": None, "budget": None,
            "commit": "0123456789abcdef", "dirty": True, "seed": seed,
            "config": {
                "seed": seed, "run_dir": str(folder), "resume": "auto", "overrides": words,
                "data": {"name": "photos"},
                "flow": {"depth": 4, "permutation": permutation, "coupling": coupling},
            },
            "versions": {}, "device": "CPU", "precision": "32-true", "tf32": False,
            "deterministic": False, "images": 128, "seconds": 6.5, "n_train": 100,
            "skipped_steps": 1, "parameters": 1000,
        }  # fmt: skip
        if not math.isfinite(bpd):  # JSON has no NaN
            result["metrics"] = {"test/bpd": None, "val/bpd": None}
        folder.mkdir(parents=True, exist_ok=True)
        if end is not None:  # as reproduce/experiment.py leaves it
            (folder / "diverged.json").write_text(
                json.dumps(result | {"metrics": {}, "skipped_steps": 21})
            )
            (folder / "curve.csv").write_text(
                "step,images,seconds,lr,train/bpd,val/bpd\n0,0,1.0,0.0,,8.0\n"
            )
            raise end
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "curve.csv").write_text(CURVE.format(bpd - 0.05, SECONDS[permutation], bpd))
        return result

    fake.main = main
    monkeypatch.setitem(sys.modules, "reproduce.glow_cifar10", fake)
    monkeypatch.setattr(
        figure3, "draw", lambda runs: b"a picture"
    )  # takes longer than all the rest
    monkeypatch.chdir(tmp_path)
    return fake


def names(script):
    return [value(words, "run_dir").split("/")[-1] for words in script.calls]


def stopped(*argv):
    """The exit code of a command that does not come to its end."""
    with pytest.raises(SystemExit) as end:
        figure3.main(list(argv))
    return end.value.code


def test_each_run_has_its_folder_and_seeds_come_last(script):
    figure3.main(["preset=cpu", "data.name=photos", "trainer.max_steps=4", "seeds=[0,3]"])
    assert names(script) == [f"{name}-seed{seed}" for seed in (0, 3) for name in NAMES]
    assert script.calls[4] == [
        *("preset=cpu", "data.name=photos", "trainer.max_steps=4"),
        *("flow.permutation=shuffle", "flow.coupling=affine", "seed=0"),
        *("run_dir=outputs/figure3/cpu/shuffle-affine-seed0", "resume=auto"),
    ]


@pytest.mark.parametrize(
    ("argv", "root", "n_runs"),
    [
        ([], "outputs/figure3/paper", 18),
        (["preset=demo", "seeds=1"], "outputs/figure3/demo", 6),
        (["out=a/b"], "a/b", 18),
    ],
)
def test_the_folder_and_the_seeds_that_are_taken_by_default(script, tmp_path, argv, root, n_runs):
    figure3.main(argv)
    assert len(list((tmp_path / root).glob("*/result.json"))) == n_runs
    assert {"figure3.json", "figure3.png"} < {path.name for path in (tmp_path / root).iterdir()}


def test_every_recipe_argument_binds():
    for permutation in figure3_results.PERMUTATIONS:
        for coupling in figure3_results.COUPLINGS:
            config = compose("glow_cifar10", figure3.run_arguments(permutation, coupling, 7))
            assert (config.flow.permutation, config.flow.coupling, config.seed) == (
                permutation,
                coupling,
                7,
            )
            assert (config.flow.depth, config.flow.n_levels, config.data.n_bits) == (
                32,
                3,
                8,
            )  # of the paper's figure


def test_what_is_written_and_printed(script, tmp_path, capsys):
    content = figure3.main(["preset=cpu", "data.root=/home/me/data", "seeds=[0,1]"])
    written = json.loads((tmp_path / "outputs/figure3/cpu/figure3.json").read_text())
    assert written == content | {"overrides": ["preset=cpu", "data.root=data"]}  # portable
    assert (written["experiment"], written["ablation"], written["name"]) == (
        "glow_cifar10",
        "figure3",
        "cpu",
    )
    assert written["config"] == {
        "data": {"name": "photos"},
        "flow": {"depth": 4},
    }  # what all runs share
    assert written["runs"][5] == {
        "permutation": "invertible", "coupling": "additive", "seed": 1,
        "test/bpd": 3.76, "val/bpd": 3.71, "images": 128, "seconds": 6.5,
        "skipped_steps": 1, "commit": "0123456789abcdef", "dirty": True,
        "device": "CPU", "precision": "32-true", "parameters": 1000,
        "curve": [[0, 1.0, 8.0], [64, 3.0, 3.71], [128, 5.5, 3.76]],
    }  # fmt: skip
    assert figure3_results.read(tmp_path / "outputs/figure3/cpu/figure3.json") == written
    assert (tmp_path / "outputs/figure3/cpu/figure3.png").read_bytes() == b"a picture"
    out = capsys.readouterr().out
    assert "run 12 of 12: outputs/figure3/cpu/invertible-affine-seed1\n" in out
    last = out[out.rindex("permutation") :].splitlines()
    assert last[0].split() == ["permutation", "coupling", "seeds", "test/bpd"]
    assert last[4].split() == ["invertible", "additive", "0,", "1", "3.7550", "±", "0.0050"]
    assert "affine: invertible < shuffle: -0.0300 ± 0.0000 over 2 seeds: agrees" in last
    assert last[-4].startswith("The order agrees with the paper's")
    assert last[-2:] == ["outputs/figure3/cpu/figure3.json", "outputs/figure3/cpu/figure3.png"]


def test_the_table_comes_after_every_run(script, capsys):
    figure3.main(["seeds=[0]"])
    tables = capsys.readouterr().out.split("permutation  coupling")[1:]
    assert len(tables) == 6
    assert "The order is not decided" in tables[0]


def test_a_finished_run_is_not_run_again(script, tmp_path, capsys):
    first = figure3.main(["seeds=[0]"])
    assert figure3.main(["seeds=[0]"]) == first
    assert len(script.calls) == 6
    (tmp_path / "outputs/figure3/paper/shuffle-affine-seed0/result.json").unlink()
    figure3.main(["seeds=[0]"])
    assert names(script)[6:] == ["shuffle-affine-seed0"]
    both = figure3.main(["seeds=[1]"])  # other seeds join
    assert names(script)[7:] == [f"{name}-seed1" for name in NAMES]
    assert [run["seed"] for run in both["runs"]] == [0, 1] * 6
    assert capsys.readouterr().out.count("The order") == 6 + 1 + 1 + 6


def test_a_run_that_has_finished_meanwhile_ends_nothing(script):
    script.ends = {3: SystemExit(0)}
    content = figure3.main(["seeds=[0]"])
    assert len(script.calls) == 6
    assert len(content["runs"]) == 5


@pytest.mark.parametrize(
    "end",
    [
        SystemExit(75),
        SystemExit("stopped"),
        SystemExit("stopped at step 3; go on with: x"),
        KeyboardInterrupt(),
    ],
)
def test_a_stopped_run_ends_all_and_the_same_command_goes_on(script, tmp_path, capsys, end):
    argv = ["preset=cpu", "seeds=[0, 1]"]
    script.ends = {4: end}
    assert stopped(*argv) == 75
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[-1]
        == "continue the ablation with: python -m reproduce.figure3 preset=cpu 'seeds=[0, 1]'"
    )
    code = getattr(end, "code", None)
    assert lines[:-1] == [code] * isinstance(code, str)
    assert len(json.loads((tmp_path / "outputs/figure3/cpu/figure3.json").read_text())["runs"]) == 3
    assert shlex.split(lines[-1].partition("figure3 ")[2]) == argv
    figure3.main(argv)
    assert names(script) == [f"{NAMES[k]}-seed0" for k in (0, 1, 2, 3, 3, 4, 5)] + [
        f"{name}-seed1" for name in NAMES
    ]
    assert script.calls[3] == script.calls[4]  # with resume=auto


def test_a_run_that_fails_ends_all_with_its_line(script, capsys):
    script.ends = {2: SystemExit("error: no data/cifar-10-batches-py")}
    assert stopped("seeds=[0]") == "error: no data/cifar-10-batches-py"
    assert len(script.calls) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["trainer.max_stps=5"],
            "trainer.max_stps is not a known key (did you mean trainer.max_steps?)",
        ),
        (["trainer.max_steps=many"], "trainer.max_steps=many has the wrong type"),
        (["preset=cup"], "preset=cup is not known"),
        (["--print-config"], "'--print-config' is not of the form key=value"),
        (
            ["flow.permutation=reverse"],
            "flow.permutation is not to be given here: it is what is compared",
        ),
        (["flow.coupling=affine"], "flow.coupling is not to be given here: it is what is compared"),
        (["seed=1"], "seed is not to be given here: give seeds=[...]"),
        (["run_dir=a"], "run_dir is not to be given here: give out=FOLDER"),
        (["resume=auto"], "resume is not to be given here"),
        (["seeds=[0,0]"], "seeds=[0,0] are no seeds"),
        (["seeds=[]"], "seeds=[] are no seeds"),
        (["seeds=[-1]"], "seeds=[-1] are no seeds"),
        (["seeds=a"], "seeds=a are no seeds"),
        (["seeds=0", "seeds=1"], "seeds is given twice, as 0 and as 1"),
        (["trainer.devices=2"], "the ablation is one process, not trainer.devices=2 on 1 nodes"),
        (["trainer.num_nodes=2"], "the ablation is one process"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(script, tmp_path, argv, message):
    code = stopped(*argv)
    assert code.startswith(f"error: {message}")
    assert "\n" not in code
    assert script.calls == []
    assert list(tmp_path.iterdir()) == []


def test_several_gpus_are_not_taken_by_one_ablation(script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert stopped("seeds=[0]").startswith(
        "error: the ablation is one process, not trainer.devices=auto on 1 nodes"
    )
    figure3.main(["seeds=[0]", "trainer.devices=1"])
    figure3.main(["seeds=[0]", "preset=cpu"])
    assert len(script.calls) == 12


def test_runs_of_other_settings_are_not_mixed(script):
    figure3.main(["preset=cpu", "trainer.max_steps=4", "seeds=[0]", "optim.lr=1e-3"])
    assert stopped("preset=cpu", "trainer.max_steps=5", "optim.lr=0.001") == (
        "error: outputs/figure3/cpu/reverse-additive-seed0 was run with trainer.max_steps=4, "
        "not with trainer.max_steps=5: say the same, or give another out=FOLDER"
    )
    assert "was run with trainer.max_steps=4, not with no trainer.max_steps:" in stopped(
        "preset=cpu", "optim.lr=1e-3"
    )
    assert "was run with preset=cpu, not with preset=demo:" in stopped(
        *("preset=demo", "trainer.max_steps=4", "optim.lr=1e-3", "out=outputs/figure3/cpu")
    )
    assert len(script.calls) == 6
    free = [
        "logger.name=none",
        "data.root=elsewhere",
        "data.num_workers=1",
    ]  # these change no number
    figure3.main([*free, "seeds=[1]", "optim.lr=0.001", "trainer.max_steps=4", "preset=cpu"])
    assert len(script.calls) == 12


def test_a_folder_of_another_experiment_is_refused(script, tmp_path):
    figure3.main(["seeds=[0]", "out=a"])
    path = tmp_path / "a/shuffle-affine-seed0/result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"experiment": "realnvp_cifar10"}))
    assert "a/shuffle-affine-seed0 is of realnvp_cifar10, not of glow_cifar10" in stopped(
        "seeds=[0]", "out=a"
    )
    path.write_text("{")
    assert "result.json is not valid JSON" in stopped("seeds=[0]", "out=a")


@pytest.mark.parametrize("first", [1, 4])
def test_a_run_that_diverged_has_no_number_and_the_others_go_on(script, tmp_path, capsys, first):
    """Also where nothing else is finished yet; the command, repeated, leaves it as it is."""
    script.ends = {first: SystemExit(DIVERGES)}
    content = figure3.main(["seeds=[0]"])
    assert names(script) == [f"{name}-seed0" for name in NAMES]
    output = capsys.readouterr()
    diverged = f"{NAMES[first - 1]}-seed0"
    assert (
        f"{DIVERGES}\noutputs/figure3/paper/{diverged} has diverged; the other runs continue"
        in output.err
    )
    assert output.out.count("- (1 not finite)") == 7 - first  # in every table from then on
    runs = figure3_results.read(tmp_path / "outputs/figure3/paper/figure3.json")["runs"]
    [diverged_run] = [run for run in runs if run["test/bpd"] is None]
    assert (
        figure3_results.name(diverged_run),
        diverged_run["skipped_steps"],
        diverged_run["curve"],
    ) == (
        diverged,
        21,
        [[0, 1.0, 8.0]],
    )
    assert len(runs) == 6
    assert figure3.main(["seeds=[0]"]) == content
    assert len(script.calls) == 6
    assert stopped("seeds=[0]", "optim.lr=1").startswith(
        "error: outputs/figure3/paper/"
    )  # its settings count too


def test_a_run_whose_test_is_not_finite_has_no_number(script, tmp_path, capsys):
    script.bpd = {"reverse-affine-seed0": math.nan}
    figure3.main(["seeds=[0]"])
    runs = figure3_results.read(tmp_path / "outputs/figure3/paper/figure3.json")["runs"]
    assert [
        run["test/bpd"] for run in runs if figure3_results.name(run) == "reverse-affine-seed0"
    ] == [None]
    assert "- (1 not finite)" in capsys.readouterr().out


def test_help(script, capsys):
    assert figure3.main(["--help"]) is None
    assert "python -m reproduce.figure3 preset=cpu seeds=0" in capsys.readouterr().out
    assert script.calls == []


# The picture


def run(seed, curve, permutation="reverse", coupling="affine"):
    return {"permutation": permutation, "coupling": coupling, "seed": seed, "curve": curve}


def test_curves_are_of_the_images_that_all_seeds_have():
    runs = [
        run(0, [[0, 1, 8.0], [64, 2, 4.0], [96, 3, 3.9], [128, 4, None]]),
        run(1, [[0, 1, 8.2], [64, 2, 4.2], [128, 5, 3.8]]),
    ]
    assert figure3.curves(runs) == {0: [8.0, 8.2], 64: [4.0, 4.2]}
    assert figure3.curves([run(0, [[0, 1, math.nan], [64, 2, 4.0]])]) == {64: [4.0]}
    assert figure3.curves([]) == {}


def test_the_picture_shows_what_comes_after_the_first_value(monkeypatch):
    from matplotlib.figure import Figure

    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, stream, **_: saved.append(figure))
    runs = [
        run(seed, [[0, 1, 900.0], [64, 2, 4.0 + seed], [128, 4, 3.0 + seed]]) for seed in (0, 1)
    ]
    figure3.draw([*runs, run(0, [[0, 1, 900.0], [64, 2, 4.5]], "invertible", "additive")])
    left, right = saved[0].axes
    assert (left.get_title(), right.get_title()) == ("additive", "affine")
    assert (
        left.get_ylim() == right.get_ylim() == pytest.approx((3.0 - 0.1 - 0.01, 5.0 + 0.2 + 0.01))
    )
    means = {
        line.get_label(): (line.get_ydata().tolist(), line.get_color()) for line in right.lines
    }
    assert means["reverse"] == ([900.0, 4.5, 3.5], "C0")
    assert {line.get_label(): line.get_color() for line in left.lines}["invertible"] == "C2"
    band = right.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} >= {
        (64.0, 4.0),
        (64.0, 5.0),
        (128.0, 3.0),
        (128.0, 4.0),
    }


@pytest.mark.parametrize(
    "curve", [[], [[0, 1, None]], [[0, 1, 8.0]], [[0, 1, 8.0], [64, 2, math.nan]]]
)
def test_a_picture_of_next_to_nothing(curve):
    with Image.open(io.BytesIO(figure3.draw([run(0, curve)]))) as image:
        assert (image.format, image.size) == ("PNG", (990, 440))
