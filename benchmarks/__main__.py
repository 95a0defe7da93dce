"""What our flows cost beside others: step time, sampling time and memory, each round of one run measuring all of them.

python -m benchmarks glow|realnvp [--json FILE] [rounds=7] [settings="K8 L3 H128 B16"]

A step is zero_grad, forward, loss, backward and optimizer (torch's Adamax for the peer's Glow, ours for ours: the
recipe's optimizer; fused Adam for RealNVP). The floor is the conditioners' convolutions alone, in the same run. bf16
is timed where the hardware multiplies it; the memory of its graph is counted everywhere. On a GPU the batches are large
ones, and "ours compiled" is as preset=gpu: compiled, replayed as a CUDA graph. FILE gets a list of rows;
results/benchmarks/KIND[-MACHINE].json are shown on the results page. Times depend on the number of threads
(OMP_NUM_THREADS).
"""

import contextlib
import json
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.json_file import take_json
from benchmarks.peers import NormflowsGlow
from benchmarks.speed import DTYPES, Candidate, Convolution, Floor, interleaved
from flows.base import FlowModel
from flows.caching import cached
from flows.glow import Glow
from flows.realnvp import RealNVP
from flows.recompute import recompute
from lightning_modules.adamax import Adamax
from lightning_modules.cuda_graph import CudaGraph
from lightning_modules.metrics import full_float32
from reproduce.config import ConfigError, arguments
from reproduce.experiment import command
from reproduce.provenance import best_precision, device_name, git_state
from results.runs import write
from results.speed import COMPILED, PEER, TUNED

SHAPE = (3, 32, 32)
GLOW = {  # n_levels, depth, hidden, batch
    "K8 L3 H128 B16": (3, 8, 128, 16),
    "K32 L3 H512 B16": (3, 32, 512, 16),
    "K32 L3 H512 B256": (3, 32, 512, 256),  # 512, the recipe's, did not fit beside the peer's on an H200
}
REALNVP = {"paper B4": (2, 64, 8, 4), "paper B256": (2, 64, 8, 256)}  # n_scales, hidden, n_blocks, batch
LARGE = ("K32 L3 H512 B256", "paper B256")  # for a GPU
N_SAMPLES = 16


def glow_convolutions(n_levels: int, depth: int, hidden: int) -> list[Convolution]:
    channels, size, convolutions = SHAPE[0], SHAPE[1], []
    for _ in range(n_levels):
        channels, size = 4 * channels, size // 2
        net = [(channels // 2, hidden, 3), (hidden, hidden, 1), (hidden, channels, 3)]
        convolutions += [Convolution(*layer, size, size) for _ in range(depth) for layer in net]
        channels //= 2
    return convolutions


def realnvp_convolutions(flow: RealNVP) -> list[Convolution]:
    """As the conditioners hold them: checkerboards at the scale's size, channel couplings at half of it."""
    convolutions = []
    for i, scale in enumerate(flow.scales):
        for layer in scale.layers:
            if hasattr(layer, "conditioner"):
                size = SHAPE[1] // 2**i // (1 if hasattr(layer, "mask") else 2)
                nets = (m for m in layer.conditioner.modules() if isinstance(m, torch.nn.Conv2d))
                convolutions += [
                    Convolution(m.in_channels, m.out_channels, *m.kernel_size[:1], size, size) for m in nets
                ]
    return convolutions


Candidates = dict[tuple[str, str], Candidate]  # by model and dtype


def ours(make: Callable[[], FlowModel], optimizer: Callable, x: Tensor) -> Candidates:
    """As it is and recomputing, in both dtypes; on a GPU also as preset=gpu. optimizer: of some weights."""
    names = [(model, dtype) for dtype in DTYPES for model in ("ours", "ours recompute")]
    candidates = {}
    for model, dtype in names if x.device.type == "cpu" else [*names, (COMPILED, "bf16")]:
        flow = make().to(x.device)
        with torch.no_grad():
            flow.initialize(x)
        if model == "ours recompute":
            recompute(flow)
        if model == COMPILED:
            flow.compile()
        graph = CudaGraph(flow) if model == COMPILED else None
        candidates[model, dtype] = Candidate(flow, optimizer(flow.parameters()), x, dtype == "bf16", graph)
    return candidates


def glow_candidates(setting: str, device: torch.device) -> tuple[Candidates, list[Convolution]]:
    *size, batch = GLOW[setting]
    x = images(batch, device)
    candidates = ours(lambda: Glow(SHAPE, *size), partial(Adamax, lr=1e-3), x)
    for model, dtype, tuned in ((PEER, "float32", False), (TUNED, "bf16", True)):
        flow = NormflowsGlow(SHAPE, *size, tuned).to(device)
        candidates[model, dtype] = Candidate(flow, torch.optim.Adamax(flow.parameters(), lr=1e-3), x)
    return candidates, glow_convolutions(*size)


def realnvp_candidates(setting: str, device: torch.device) -> tuple[Candidates, list[Convolution]]:
    *size, batch = REALNVP[setting]
    adam = partial(torch.optim.Adam, lr=1e-3, fused=True)
    candidates = ours(lambda: RealNVP(SHAPE, *size), adam, images(batch, device))
    return candidates, realnvp_convolutions(candidates["ours", "float32"].flow)


def images(n: int, device: torch.device) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(0)).to(device)


KINDS = {"glow": (GLOW, glow_candidates), "realnvp": (REALNVP, realnvp_candidates)}


def measure(kind: str, setting: str, rounds: int, device: torch.device, bf16: bool) -> list[dict]:
    """A row a model and dtype."""
    torch.manual_seed(0)
    candidates, convolutions = KINDS[kind][1](setting, device)
    batch = len(next(iter(candidates.values())).x)
    kept = {key: c.activation_bytes() / batch for key, c in candidates.items() if c.graph is None}
    timed = {key: c for key, c in candidates.items() if bf16 or key[1] == "float32"}
    floors = {dtype: Floor(convolutions, batch, DTYPES[dtype], device) for dtype in {dtype for _, dtype in timed}}
    actions = {key: c.step for key, c in timed.items()} | {dtype: floor.step for dtype, floor in floors.items()}
    steps = interleaved(actions, rounds, device)
    with contextlib.ExitStack() as blocks:
        for candidate in timed.values():
            blocks.enter_context(cached(candidate.flow.eval()))
        sampling = interleaved({key: lambda c=c: c.sample(N_SAMPLES) for key, c in timed.items()}, rounds, device)
    return [
        {
            "model": key[0],
            "setting": setting,
            "dtype": key[1],
            "step_s": steps.get(key),
            "floor_s": steps.get(key[1]),
            "sample_s_per_image": sampling[key] / N_SAMPLES if key in sampling else None,
            "activation_bytes_per_image": kept.get(key),
        }
        for key in candidates
    ]


@command
def main(argv: list[str] | None = None) -> list[dict] | None:
    """Measure, print, write."""
    given = arguments(argv)
    if not given or {"--help", "-h"} & set(given):
        print(__doc__.strip())
        return None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, path, rounds, settings = read(given, device)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as preset=gpu
    bf16 = best_precision("auto") == "bf16-mixed"
    commit, dirty = git_state()
    about = {
        "machine": device_name(device),
        "versions": {name: metadata.version(name) for name in ("torch", "normflows")},
        "rounds": rounds,
        "commit": commit,
        "dirty": dirty,
    }
    rows = []
    for setting in settings:
        with full_float32(device.type):
            measured = measure(kind, setting, rounds, device, bf16)
        for row in measured:
            print(json.dumps(row), flush=True)
        rows += [row | about for row in measured]
        if path is not None:
            write(path, json.dumps(rows, indent=1) + "\n")
    return rows


def read(given: list[str], device: torch.device) -> tuple[str, Path | None, int, list[str]]:
    """Kind, file, rounds, settings. ConfigError: a mistake in them."""
    kind, rounds = given[0], 7
    if kind not in KINDS:
        raise ConfigError(f"'{kind}' is not measured here: give one of {', '.join(KINDS)}")
    path, words = take_json(given[1:])
    known = list(KINDS[kind][0])
    settings = [setting for setting in known if (setting in LARGE) == (device.type == "cuda")]
    for word in words:
        key, _, value = word.partition("=")
        if key == "rounds" and value.isdecimal() and int(value) > 0:
            rounds = int(value)
        elif key == "settings" and value in known:
            settings = [value]
        else:
            raise ConfigError(f"{word} is not understood: give --json FILE, rounds=7 or settings= one of {known}")
    return kind, path, rounds, settings


if __name__ == "__main__":
    main()
