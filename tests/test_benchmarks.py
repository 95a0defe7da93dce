"""What `python -m benchmarks` counts and writes; its times are never tested."""

import json

import pytest
import torch
from torch import nn

from benchmarks import __main__ as benchmarks
from benchmarks.speed import Candidate, Floor, interleaved
from flows.glow import Glow
from flows.realnvp import RealNVP

KEYS = {"model", "setting", "dtype", "step_s", "floor_s", "sample_s_per_image", "activation_bytes_per_image"}


def conditioner_weights(flow):
    """Numbers of weights of all convolutions inside of conditioners, by module."""
    nets = [m.conditioner for m in flow.modules() if hasattr(m, "conditioner")]
    return sorted(m.weight.numel() for net in nets for m in net.modules() if isinstance(m, nn.Conv2d))


def counted(convolutions):
    return sorted(c.c_in * c.c_out * c.kernel_size**2 for c in convolutions)


def multiplications(flow, x, convolutions):
    """Of one image, seen by hooks on the modules, and by the list."""
    seen = []

    def note(module, arguments, y):
        seen.append(module.weight.numel() * y.shape[2] * y.shape[3])

    for module in (m for m in flow.modules() if hasattr(m, "conditioner")):
        for conv in (m for m in module.conditioner.modules() if isinstance(m, nn.Conv2d)):
            conv.register_forward_hook(note)
    flow(x)
    return sum(seen), sum(c.c_in * c.c_out * c.kernel_size**2 * c.height * c.width for c in convolutions)


def test_the_floor_has_the_convolutions_of_glow_s_conditioners():
    convolutions = benchmarks.glow_convolutions(3, 2, 5)
    assert counted(convolutions) == conditioner_weights(Glow((3, 32, 32), 3, 2, 5))
    by_hand = sum(2 * (9 * c // 2 * 5 + 25 + 9 * 5 * c) * s * s for c, s in ((12, 16), (24, 8), (48, 4)))
    assert sum(c.c_in * c.c_out * c.kernel_size**2 * c.height * c.width for c in convolutions) == by_hand


def test_the_floor_has_the_convolutions_of_realnvp_s_conditioners():
    flow = RealNVP((3, 32, 32), 2, 4, 1)
    convolutions = benchmarks.realnvp_convolutions(flow)
    assert counted(convolutions) == conditioner_weights(flow)
    seen, listed = multiplications(flow, torch.rand(1, 3, 32, 32), convolutions)
    assert seen == listed


def test_the_floor_runs_forward_and_both_gradients(monkeypatch):
    calls = []
    convolution = torch.nn.functional.conv2d
    monkeypatch.setattr("torch.nn.functional.conv2d", lambda *a, **k: calls.append(a[1].shape) or convolution(*a, **k))
    floor = Floor(benchmarks.glow_convolutions(1, 2, 4), 2, torch.float32, torch.device("cpu"))
    floor.step()
    assert [tuple(shape) for shape in calls] == 2 * [(4, 6, 3, 3), (4, 4, 1, 1), (12, 4, 3, 3)]
    assert len({weight.data_ptr() for _, weight, _ in floor.work}) == 6
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _, _ in floor.work)


def test_interleaved_takes_turns_and_medians(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    durations = {"a": iter([9.0, 1.0, 5.0, 2.0]), "b": iter([9.0, 7.0, 7.0, 8.0])}

    def action(name):
        order.append(name)
        clock[0] += next(durations[name])

    actions = {name: (lambda name=name: action(name)) for name in durations}
    assert interleaved(actions, 3, torch.device("cpu")) == {"a": 2.0, "b": 7.0}  # the first round does not count
    assert order == ["a", "b"] * 4


class Squares(nn.Module):
    """log_prob = sum (w x)^2: its graph keeps w x, and w and x, which are no activations."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def log_prob(self, x):
        return (x * self.weight).square().sum(1)


def test_activation_bytes_by_hand():
    flow, x = Squares(), torch.rand(4, 3)
    assert Candidate(flow, torch.optim.SGD(flow.parameters(), 1e-3), x).activation_bytes() == 4 * 3 * 4


def test_recompute_keeps_less(monkeypatch):
    monkeypatch.setitem(benchmarks.GLOW, "tiny", (2, 2, 128, 16))
    candidates, _ = benchmarks.glow_candidates("tiny", torch.device("cpu"))
    kept = {model: c.activation_bytes() for (model, dtype), c in candidates.items() if dtype == "float32"}
    hidden = 2 * 2 * 16 * 4 * (16 * 16 + 8 * 8) * 128  # two hidden layers of two steps a level, 16 images, 4 bytes
    assert kept["ours"] > hidden
    assert kept["ours recompute"] < hidden / 4
    assert kept["normflows"] > 2 * hidden  # before and after every ReLU


@pytest.mark.parametrize("kind", ["glow", "realnvp"])
def test_it_prints_and_writes_rows(kind, tmp_path, monkeypatch, capsys):
    tiny = {"glow": (1, 1, 4, 2), "realnvp": (1, 2, 1, 2)}[kind]
    monkeypatch.setattr(benchmarks, "KINDS", {kind: ({"tiny": tiny}, benchmarks.KINDS[kind][1])})
    monkeypatch.setitem(getattr(benchmarks, kind.upper()), "tiny", tiny)
    monkeypatch.setattr(benchmarks, "best_precision", lambda accelerator: "32-true")
    rows = benchmarks.main([kind, "--json", str(tmp_path / "speed.json"), "rounds=1"])
    assert json.loads((tmp_path / "speed.json").read_text()) == rows
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    assert all(row.keys() >= KEYS | {"machine", "commit", "rounds"} for row in rows)
    by_model = {(row["model"], row["dtype"]): row for row in rows}
    assert {"ours", "ours recompute"} <= {model for model, _ in by_model}
    assert (("normflows", "float32") in by_model) == (kind == "glow")
    for (_, dtype), row in by_model.items():
        measured = [row["step_s"], row["floor_s"], row["sample_s_per_image"]]
        assert measured == [None] * 3 if dtype == "bf16" else min(measured) > 0
        assert row["activation_bytes_per_image"] > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["srflow"], "'srflow' is not measured here: give one of glow, realnvp"),
        (["glow", "--json"], "--json needs a file"),
        (["glow", "rounds=0"], "rounds=0 is not understood"),
        (["glow", "settings=K9"], "settings=K9 is not understood"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(given, message):
    with pytest.raises(SystemExit) as error:
        benchmarks.main(given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
