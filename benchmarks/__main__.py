"""Step time, sampling time and memory of our flows and of others.

python -m benchmarks glow|realnvp|srflow [--json FILE] [rounds=7] [settings="K8 L3 H128 B16"]

All models take turns in every round of one run, so that their ratios do not depend on what else the
machine does at the time.

A step is zero_grad, forward, loss, backward and optimizer: our Adamax for our Glow and torch's
for the peer's, and fused Adam for RealNVP and SRFlow. "convolutions alone" are those of the
conditioners, and of SRFlow's encoder, without the rest of the flow: a step that does the same work
one convolution after another cannot be faster than they are. A step whose encoder is frozen does
less, and has no such bound.

On a CPU each model has a process of its own, which sleeps while others work. bf16 is timed only on
hardware that multiplies bf16; the memory of its graph is counted everywhere. On a GPU the batches
are larger, and "ours compiled" is the flow of preset=gpu: compiled, and replayed as a CUDA graph.

FILE gets a list of rows; the results page shows results/benchmarks/KIND[-MACHINE].json. Times
depend on the number of threads (OMP_NUM_THREADS).
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.candidates import FLOOR, FROZEN, LARGE, SETTINGS, Name, Size, make, names
from benchmarks.json_file import take_json
from benchmarks.turns import InProcess, OwnProcess, interleaved
from lightning_modules.precision import full_float32
from reproduce.config import ConfigError, arguments, parse
from reproduce.experiment import command
from reproduce.provenance import best_precision, device_name, git_state
from reproduce.streams import say
from results.files import write
from results.speed import COMPILED

ROUNDS = 7


def measure(size: Size, rounds: int, device: torch.device, apart: bool, bf16: bool) -> list[dict]:
    """Measure all models at one size. Returns a row for each model and dtype.

    apart: each model has a process of its own. bf16: it is timed; otherwise only its memory is
    counted.
    """
    start: Callable[[Callable[[], object]], OwnProcess | InProcess] = InProcess
    if apart:
        start = OwnProcess
    turns: dict[Name, OwnProcess | InProcess] = {}
    kept: dict[Name, float] = {}
    for name in names(size, device):
        turns[name] = start(partial(make, size, name, device))
        if name[0] != COMPILED:
            kept[name] = turns[name]("activation_bytes")[1] / size.batch
        if name[1] == "bf16" and not bf16:
            turns.pop(name).close()
    dtypes = dict.fromkeys(dtype for _, dtype in turns)
    floors = {
        (FLOOR, dtype): start(partial(make, size, (FLOOR, dtype), device)) for dtype in dtypes
    }
    steps = interleaved(turns | floors, "step", rounds)
    for turn in turns.values():
        turn("freeze")
    sampling = interleaved(turns, "sample", rounds)
    for turn in (turns | floors).values():
        turn.close()
    per_image = {name: seconds / size.n_samples for name, seconds in sampling.items()}
    return [
        {
            "model": name[0],
            "dtype": name[1],
            "step_s": steps.get(name),
            "floor_s": None if name[0] in FROZEN else steps.get((FLOOR, name[1])),
            "sample_s_per_image": per_image.get(name),
            "activation_bytes_per_image": kept.get(name),
        }
        for name in names(size, device)
    ]


@command
def main(argv: list[str] | None = None) -> list[dict] | None:
    """Measure, print each row, and write the file."""
    words = arguments(argv)
    if not words or {"--help", "-h"} & set(words):
        say((__doc__ or "").strip())
        return None
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda")
    kind, path, rounds, settings = read(words, device)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as preset=gpu
    apart = device.type == "cpu"
    bf16 = best_precision("auto") == "bf16-mixed"
    commit, dirty = git_state()
    about = {
        "machine": device_name(device),
        "versions": {name: metadata.version(name) for name in ("torch", "normflows")},
        "rounds": rounds,
        "apart": apart,
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    rows = []
    for setting in settings:
        with full_float32(device.type):
            measured = [
                {"setting": setting} | row
                for row in measure(SETTINGS[kind][setting], rounds, device, apart, bf16)
            ]
        for row in measured:
            say(json.dumps(row))
        rows += [row | about for row in measured]
        if path is not None:
            write(path, json.dumps(rows, indent=1) + "\n")
    return rows


def read(words: list[str], device: torch.device) -> tuple[str, Path | None, int, list[str]]:
    """Kind, file, rounds, settings. ConfigError: a mistake in them."""
    kind = words[0]
    rounds = ROUNDS
    if kind not in SETTINGS:
        raise ConfigError(f"'{kind}' is not measured here: give one of {', '.join(SETTINGS)}")
    path, words = take_json(words[1:])
    choices = list(SETTINGS[kind])
    settings = [setting for setting in choices if (setting in LARGE) == (device.type == "cuda")]
    for key, value in parse(words).items():
        if key == "rounds" and value.isdecimal() and int(value) > 0:
            rounds = int(value)
        elif key == "settings" and value in choices:
            settings = [value]
        else:
            raise ConfigError(
                f"{key}={value} is not understood: "
                f"give --json FILE, rounds=7 or settings= one of {choices}"
            )
    return kind, path, rounds, settings


if __name__ == "__main__":
    main()
