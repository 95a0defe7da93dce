"""An affine Glow stays finite (benchmarks/stability.py).

The slow tests need CIFAR-10, and an hour or more on two cores.
"""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import stability
from benchmarks.stability import KINDS, main, round_trip, train
from flows.glow import Glow
from lightning_modules.stopping import RunStopped
from reproduce.config import compose
from results import stability as stored

DATA = Path(__file__).parent.parent / "data"
needs_cifar = pytest.mark.skipif(
    not (DATA / "cifar-10-batches-py").is_dir(), reason="no CIFAR-10 under data/"
)
LOCAL = [f"data.root={DATA}", "data.download=false"]


@pytest.mark.slow  # and not `data`: `pytest -m data` is to take seconds
@needs_cifar
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", KINDS["short"][0])
def test_300_steps_of_a_deep_glow_never_rise(seed, tmp_path):
    row = train("short", seed, tmp_path / "run", LOCAL, every=10)
    assert (row["steps"], row["skipped_steps"], len(row["bpd"]), row["depth"]) == (300, 0, 31, 32)
    assert row["optim"]["warmup_steps"] == 980
    assert torch.tensor(row["bpd"]).isfinite().all()
    assert row["highest_rise"] <= 0.1
    assert row["bpd"][-1] < row["bpd"][0] - 0.5


@pytest.mark.slow  # and not `data`: `pytest -m data` is to take seconds
@needs_cifar
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("seed", KINDS["long"][0])
def test_10_000_steps_stay_finite_and_invertible(seed, tmp_path):
    row = train("long", seed, tmp_path / "run", LOCAL, every=100)
    assert (row["steps"], row["skipped_steps"]) == (10_000, 0)
    assert torch.tensor(row["bpd"]).isfinite().all()
    # Python's max may pass over a NaN.
    assert all(error <= 1 for error in row["round_trip_grey_levels"].values())
    assert row["finite_T0.7"] == 1


@pytest.mark.data
@needs_cifar
def test_a_few_steps_give_a_row(tmp_path):
    overrides = [*LOCAL, "flow.depth=1", "flow.hidden_channels=4", "trainer.max_steps=4"]
    row = train("short", 3, tmp_path / "run", overrides, every=2)
    assert (row["seed"], row["steps"], row["skipped_steps"], len(row["bpd"])) == (3, 4, 0, 3)
    assert row["highest_rise"] == max(row["bpd"]) - row["bpd"][0]
    assert 5 < row["bpd"][2] < row["bpd"][0] < 9
    assert all(error < 0.01 for error in row["round_trip_grey_levels"].values())


def test_round_trip_is_in_grey_levels():
    class Off(Glow):
        def inverse(self, z, context=None):
            x, log_det = super().inverse(z, context)
            return x + 1 / 256, log_det

    torch.manual_seed(0)
    flow = Off((1, 4, 4), 1, 1, 2).double()
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    assert round_trip(flow, x) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shrot"], "is no kind: give one of short, long"),
        ([], "is no kind: give one of short, long"),
        (["short", "seeds=a"], "seeds=a are no seeds"),
        (["short", "seed=3"], "seed is not to be given here"),
        (["short", "seeds=0", "seeds=1"], "seeds is given twice"),
        (["short", "--json"], "--json needs a file"),
    ],
)
def test_mistakes_are_one_line(words, message):
    with pytest.raises(SystemExit, match=message):
        main(words)


def test_a_run_that_blows_up_is_a_row_and_the_next_seed_is_run(tmp_path, capsys):
    """With a learning rate of 1e30 nothing is finite after the first step."""
    tiny = [
        "data.name=photos",
        "data.size=8",
        "data.n_train=64",
        "data.n_val=8",
        "data.n_test=8",
        "flow.depth=1",
    ]
    tiny += [
        "flow.hidden_channels=4",
        "optim.lr=1e30",
        "optim.warmup_steps=0",
        "optim.max_skipped=3",
    ]
    path = tmp_path / "short.json"
    main(["short", "seeds=0,1", "--json", str(path), "trainer.log_every_n_steps=1", *tiny])
    rows = stored.read(path)["runs"]
    assert [(row["seed"], row["steps"], row["skipped_steps"]) for row in rows] == [
        (0, 5, 4),
        (1, 5, 4),
    ]
    for row in rows:
        assert row["round_trip_grey_levels"] == {"images": None, "noise": None}
        assert not row["finite_T0.7"]  # 0, or null where a matrix has no inverse
        assert not row["finite_T1"]
        assert 5 < row["bpd"][0] < 9
        assert row["optim"]["max_skipped"] == 3
    assert capsys.readouterr().out.count('"skipped_steps": 4') == 2


@pytest.fixture
def trained(monkeypatch):
    """The arguments of each call of `train`, which trains nothing.

    It is asked to stop in seed 7, and fails in seed 8 for another reason.
    """
    calls = []

    def fake(kind, seed, folder, overrides, every):
        if seed >= 7:
            raise RunStopped("stopped at step 3; go on with: ...", {7: 75}.get(seed, 1))
        calls.append((kind, seed, overrides, every))
        config = compose("glow_cifar10", stability.shared_arguments(kind, overrides))
        return {
            "seed": seed,
            "steps": 300,
            "skipped_steps": 0,
            "bpd": [7.0, float("nan")],
            "highest_rise": None,
            "round_trip_grey_levels": {"images": 0.001, "noise": None},
            "finite_T0.7": 1.0,
            "finite_T1": 1.0,
            "commit": None,
            "dirty": False,
            "device": "CPU",
            **stability.model_entries(config),
        }

    monkeypatch.setattr(stability, "train", fake)
    return calls


def test_every_seed_is_written_and_not_run_again(tmp_path, trained, capsys):
    command = [
        "long",
        "--json",
        str(tmp_path / "long.json"),
        "optim.lr=1e-4",
        "data.root=/somewhere",
    ]
    main([*command, "seeds=2,0"])
    main([*command, "seeds=0,1"])
    assert trained == [
        ("long", seed, ["optim.lr=1e-4", "data.root=/somewhere"], 100) for seed in (2, 0, 1)
    ]
    content = json.loads((tmp_path / "long.json").read_text())
    assert content["overrides"] == ["optim.lr=1e-4", "data.root=somewhere"]
    assert [(run["seed"], run["bpd"]) for run in content["runs"]] == [
        (seed, [7.0, None]) for seed in (2, 0, 1)
    ]
    with pytest.raises(SystemExit, match=r"holds long optim.lr=1e-4 .*: give another file"):
        main(["short", *command[1:]])
    with pytest.raises(SystemExit, match=r"holds long optim.lr=1e-4 .*: give another file"):
        main([*command, "flow.coupling=additive"])
    advice = f": repeat the command, {tmp_path / 'long.json'} keeps finished seeds"
    for words, end_of_line in ((command, advice), (["long"], "")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([*words, "seeds=7"])
        assert end.value.code == 75
        assert capsys.readouterr().err == f"stopped in seed 7{end_of_line}\n"
    with pytest.raises(SystemExit, match="error: stopped at step 3; go on with"):
        main(["long", "seeds=8"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 8}, "depth=8, not with depth=4"),
        ({"min_scale": 0.0}, "min_scale=0.0, not with min_scale=0.5"),
        ({"min_scale": 0.25}, "min_scale=0.25, not with min_scale=0.5"),
        ({"optim.lr": 0.01}, "optim.lr=0.01, not with optim.lr=0.001"),
    ],
)
def test_a_file_of_another_model_is_not_gone_on_with(tmp_path, trained, change, message):
    """The file is of a version of this program whose `long` was another model."""
    path = tmp_path / "long.json"
    main(["long", "seeds=0", "--json", str(path)])
    content = json.loads(path.read_text())
    [run] = content["runs"]
    for key, value in change.items():
        section, _, name = key.rpartition(".")
        parts = {"": run, "optim": run["optim"]}
        parts[section][name] = value
    path.write_text(json.dumps(content))
    assert refusal(path).endswith(f"long.json holds runs with {message}: give another file")
    assert len(trained) == 1


def test_a_run_recorded_without_its_lowest_scale_had_the_authors(tmp_path, trained):
    path = tmp_path / "long.json"
    main(["long", "seeds=0", "--json", str(path)])
    content = json.loads(path.read_text())
    del content["runs"][0]["min_scale"]
    path.write_text(json.dumps(content))
    assert "min_scale=0.0, not with min_scale=0.5" in refusal(path)


def refusal(path):
    """The message of the command that goes on with a file."""
    with pytest.raises(SystemExit) as end:
        main(["long", "seeds=1", "--json", str(path)])
    return end.value.code


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', '{"kind": "long", "overr'])
def test_a_file_of_another_program_is_named(tmp_path, trained, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(
        SystemExit, match=r"^error: .*other\.json is not what benchmarks\.stability writes"
    ) as end:
        main(["long", "--json", str(path)])
    assert "\n" not in end.value.code
    assert (path.read_text(), trained) == (content, [])


@pytest.mark.parametrize(
    "path", sorted((Path(stored.ROOT) / "stability").glob("*.json")), ids=lambda path: path.stem
)
def test_what_is_recorded_can_be_gone_on_with(tmp_path, trained, path):
    content = stored.read(path)
    copy = tmp_path / path.name
    copy.write_text(path.read_text())
    seeds = ",".join(str(run["seed"]) for run in content["runs"])
    assert (
        main([content["kind"], *content["overrides"], f"seeds={seeds}", "--json", str(copy)])
        == content["runs"]
    )
    assert trained == []
