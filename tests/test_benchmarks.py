"""What `python -m benchmarks` counts and writes; its times are never tested."""

import ctypes
import json
import multiprocessing
import os
import pickle
import re
import threading
from functools import partial
from types import SimpleNamespace

import cases
import pytest
import torch
from torch import nn

from benchmarks import __main__ as benchmarks
from benchmarks import candidates, overhead
from benchmarks.candidates import GlowSize, RealNVPSize, SRFlowSize
from benchmarks.speed import Candidate, Floor
from benchmarks.turns import InProcess, OwnProcess, _serve, interleaved
from flows.glow import Glow
from flows.realnvp import RealNVP
from reproduce.config import ConfigError, override

KEYS = {
    "model",
    "setting",
    "dtype",
    "step_s",
    "floor_s",
    "sample_s_per_image",
    "activation_bytes_per_image",
}


TINY_SRFLOW = SRFlowSize(
    scale=4,
    n_levels=3,
    side=16,
    batch=8,
    options=(
        ("depth", 1),
        ("hidden_channels", 5),
        ("encoder_blocks", 2),
        ("encoder_channels", 4),
        ("encoder_growth", 3),
        ("stacked", (0, 1)),
    ),
)


def conditioner_weights(flow):
    """How many weights each convolution inside a conditioner has, from its module."""
    nets = [m.conditioner for m in flow.modules() if hasattr(m, "conditioner")]
    return sorted(
        m.weight.numel() for net in nets for m in net.modules() if isinstance(m, nn.Conv2d)
    )


def counted(convolutions):
    return sorted(c.c_in * c.c_out * c.kernel_size**2 for c in convolutions)


def multiplications(flow, x, convolutions):
    """The multiplications for one image: as hooks on the modules see them, and by the list."""
    seen = []

    def note(module, arguments, y):
        seen.append(module.weight.numel() * y.shape[2] * y.shape[3])

    for module in (m for m in flow.modules() if hasattr(m, "conditioner")):
        for conv in (m for m in module.conditioner.modules() if isinstance(m, nn.Conv2d)):
            conv.register_forward_hook(note)
    flow(x)
    return sum(seen), sum(
        c.c_in * c.c_out * c.kernel_size**2 * c.height * c.width for c in convolutions
    )


def test_the_floor_has_the_convolutions_of_glow_s_conditioners():
    convolutions = GlowSize(3, 2, 5, 1).convolutions()
    assert counted(convolutions) == conditioner_weights(Glow((3, 32, 32), 3, 2, 5))
    by_hand = sum(
        2 * (9 * c // 2 * 5 + 25 + 9 * 5 * c) * s * s for c, s in ((12, 16), (24, 8), (48, 4))
    )
    assert (
        sum(c.c_in * c.c_out * c.kernel_size**2 * c.height * c.width for c in convolutions)
        == by_hand
    )


def test_the_floor_has_the_convolutions_of_realnvp_s_conditioners():
    flow = RealNVP((3, 32, 32), 2, 4, 1)
    convolutions = RealNVPSize(2, 4, 1, 1).convolutions()
    assert counted(convolutions) == conditioner_weights(flow)
    seen, listed = multiplications(flow, torch.rand(1, 3, 32, 32), convolutions)
    assert seen == listed


def test_the_floor_has_the_convolutions_of_srflow_s_encoder_and_conditioners():
    flow = TINY_SRFLOW.flow()
    low_res = torch.rand(1, 3, 4, 4)
    seen = []

    def note(module, arguments, y):
        seen.append(module.weight.numel() * y.shape[2] * y.shape[3])

    encoder = flow.context_encoder
    singles = [encoder.conv_in, encoder.conv_trunk, *encoder.upsamplings]
    for conv in singles:
        conv.register_forward_hook(note)
    features = encoder(low_res)
    growth = encoder.blocks[0].blocks[0].convs[0].out_channels
    dense = sum((4 + i * growth) * c * 9 for i, c in enumerate([growth] * 4 + [4]))
    seen.append(len(encoder.blocks) * 3 * dense * 4 * 4)
    for i, u in enumerate(features):
        channels = (12, 24, 96)[i]
        networks = ((0, 2 * channels), (channels // 2, channels))
        seen += [
            (9 * (kept + u.shape[1]) * 5 + 5 * 5 + 9 * 5 * out) * u.shape[2] * u.shape[3]
            for kept, out in networks
        ]
    assert sum(seen) == sum(
        c.c_in * c.c_out * c.kernel_size**2 * c.height * c.width for c in TINY_SRFLOW.convolutions()
    )


def test_the_floor_runs_forward_and_both_gradients(monkeypatch):
    calls = []
    convolution = torch.nn.functional.conv2d
    monkeypatch.setattr(
        "torch.nn.functional.conv2d",
        lambda *a, **k: calls.append(a[1].shape) or convolution(*a, **k),
    )
    floor = Floor(GlowSize(1, 2, 4, 1).convolutions(), 2, torch.float32, torch.device("cpu"))
    floor.step()
    assert [tuple(shape) for shape in calls] == 2 * [(4, 6, 3, 3), (4, 4, 1, 1), (12, 4, 3, 3)]
    assert len({weight.data_ptr() for _, weight, _ in floor.work}) == 6
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _, _ in floor.work)


def test_interleaved_takes_turns_and_medians():
    order = []
    durations = {"a": iter([9.0, 1.0, 5.0, 2.0]), "b": iter([9.0, 7.0, 7.0, 8.0])}

    def turn(name, method):
        order.append((name, method))
        return next(durations[name]), None

    turns = {name: partial(turn, name) for name in durations}
    assert interleaved(turns, "step", 3) == {"a": 2.0, "b": 7.0}  # the first round does not count
    assert order == [("a", "step"), ("b", "step")] * 4


class Mallinfo2(ctypes.Structure):
    """The structure that mallinfo2(3) returns."""

    names = (
        "arena",
        "ordblks",
        "smblks",
        "hblks",
        "hblkhd",
        "usmblks",
        "fsmblks",
        "uordblks",
        "fordblks",
        "keepcost",
    )
    _fields_ = [(name, ctypes.c_size_t) for name in names]


class Counter:
    """What is measured in another process, which has to find it by its name."""

    def __init__(self, start):
        self.count = start

    def step(self):
        self.count += 1
        return self.count

    def process(self):
        return os.getpid()

    def mapped(self):
        """Bytes that malloc maps apart for 20 MiB, and gives back when they are freed."""
        statistics = ctypes.CDLL(None).mallinfo2
        statistics.restype = Mallinfo2
        before = statistics().hblkhd
        tensor = torch.empty(20 * 2**20, dtype=torch.uint8)
        after = statistics().hblkhd
        del tensor
        return after - before

    def break_off(self):
        os._exit(3)


def test_turns_here_are_timed(monkeypatch):
    clock = iter([1.0, 3.5])
    monkeypatch.setattr("benchmarks.turns.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert InProcess(partial(Counter, 5))("step") == (2.5, 6)


def test_turns_apart_are_in_another_process_and_its_end_is_one_line(request):
    turn = OwnProcess(partial(Counter, 5))
    request.addfinalizer(turn.process.kill)
    assert [turn("step")[1] for _ in range(2)] == [6, 7]
    seconds, process = turn("process")
    assert 0 < seconds < 5
    if hasattr(ctypes.CDLL(None), "mallinfo2") and not any(
        key.startswith("MALLOC_") or key == "GLIBC_TUNABLES" for key in os.environ
    ):
        assert turn("mapped")[1] == 0  # malloc keeps them for later
    assert process == turn.process.pid != os.getpid()
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"^a process that measures ended with exit code 3: "
        ) as error:
            turn("break_off")
        assert "\n" not in str(error.value)


def test_the_other_process_ends_quietly_with_its_pipe():
    ours, theirs = multiprocessing.Pipe()
    served = threading.Thread(target=_serve, args=(partial(Counter, 5), theirs), daemon=True)
    served.start()
    assert ours.recv() is None
    ours.send("step")
    assert ours.recv()[1] == 6
    ours.close()
    served.join(10)
    assert not served.is_alive()


class Squares(nn.Module):
    """log_prob = sum (w x)^2. The graph keeps w x, and also w and x, which are no activations."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def log_prob(self, x):
        return (x * self.weight).square().sum(1)


def test_activation_bytes_by_hand():
    flow = Squares()
    candidate = Candidate(flow, torch.optim.SGD(flow.parameters(), 1e-3), torch.rand(4, 3))
    assert candidate.activation_bytes() == 4 * 3 * 4


def test_recompute_keeps_less():
    def kept(model):
        return candidates.make(
            GlowSize(2, 2, 128, 16), (model, "float32"), torch.device("cpu")
        ).activation_bytes()

    # Two hidden layers of two steps a level, for 16 images, in 4 bytes.
    hidden = 2 * 2 * 16 * 4 * (16 * 16 + 8 * 8) * 128
    assert kept("ours") > hidden
    assert kept("ours recompute") < hidden / 4
    assert kept("normflows") > 2 * hidden  # before and after every ReLU


@pytest.mark.parametrize(
    ("kind", "size"),
    [("glow", GlowSize(1, 1, 4, 2)), ("realnvp", RealNVPSize(1, 2, 1, 2)), ("srflow", TINY_SRFLOW)],
    ids=["glow", "realnvp", "srflow"],
)
def test_the_command_prints_and_writes_rows(kind, size, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmarks, "SETTINGS", {kind: {"tiny": size}})
    started = []
    monkeypatch.setattr(
        benchmarks,
        "OwnProcess",
        lambda make: started.append(make) or InProcess(pickle.loads(pickle.dumps(make))),
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(benchmarks, "best_precision", lambda accelerator: "32-true")
    rows = benchmarks.main([kind, "--json", str(tmp_path / "speed.json"), "rounds=1"])
    assert json.loads((tmp_path / "speed.json").read_text()) == rows
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    assert all(row.keys() >= KEYS | {"machine", "commit", "rounds", "apart"} for row in rows)
    assert len(started) == len(rows) + 1  # one more: the convolutions alone, in float32
    assert all(row["apart"] for row in rows)
    by_model = {(row["model"], row["dtype"]): row for row in rows}
    assert {"ours", "ours recompute"} <= {model for model, _ in by_model}
    assert (("normflows", "float32") in by_model) == (kind == "glow")
    for (_, dtype), row in by_model.items():
        measured = [row["step_s"], row["floor_s"], row["sample_s_per_image"]]
        if "encoder frozen" in row["model"]:
            assert measured.pop(1) is None
        if dtype == "bf16":
            assert set(measured) == {None}
        else:
            assert min(measured) > 0
        assert row["activation_bytes_per_image"] > 0


def test_sampling_makes_what_depends_on_weights_once(monkeypatch):
    candidate = candidates.make(GlowSize(1, 1, 4, 2), ("ours", "float32"), torch.device("cpu"))
    inverses = []
    inverse = torch.linalg.inv
    monkeypatch.setattr("torch.linalg.inv", lambda w: inverses.append(w.shape) or inverse(w))
    candidate.sample()
    candidate.freeze()
    assert not candidate.flow.training
    for _ in range(3):
        candidate.sample()
    assert len(inverses) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nice"], "'nice' is not measured here: give one of glow, realnvp, srflow"),
        (["glow", "--json"], "--json needs a file"),
        (["glow", "rounds=0"], "rounds=0 is not understood"),
        (["glow", "settings=K9"], "settings=K9 is not understood"),
        (["glow", "rounds=1", "rounds=2"], "rounds is given twice"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(words, message):
    with pytest.raises(SystemExit) as error:
        benchmarks.main(words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_validations_are_timed_beside_forward_passes_on_the_same_images(
    tmp_path, capsys, monkeypatch
):
    """In turns: the forward passes come after the validation, then before it, and so on."""
    order = []
    note(monkeypatch, overhead.ForwardAlone, "_forward", order)
    note(monkeypatch, overhead.DensityModule, "on_validation_epoch_start", order)
    words = override(cases.TINY, ["trainer.max_steps=3", "trainer.val_check_interval=1"])
    overhead.main(["evaluation", *words, f"run_dir={tmp_path / 'run'}"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("1 rank(s), 3 validations of 24 images a rank: ")
    assert re.search(r"forward passes alone \d+\.\d{4} s, ratio \d+\.\d{4}$", line)
    loop = "on_validation_epoch_start"
    assert order == [loop, *("_forward", loop), *(loop, "_forward"), *("_forward", loop)]


def note(monkeypatch, owner, name, order):
    """Append the name of a method to a list at each call of it."""
    method = getattr(owner, name)

    def noted(*arguments):
        order.append(name)
        return method(*arguments)

    monkeypatch.setattr(owner, name, noted)
