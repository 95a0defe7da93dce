"""Trained weights and where they come from, read from what a run or an export has left behind."""

import hashlib
import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

import results
from datamodules import DATA
from datamodules.checks import expand_home
from reproduce.config import ConfigError, nearest
from reproduce.run_folder import (
    RESULT,
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    read_result,
)
from results.checks import check, keys, list_of, or_null, record, text
from results.files import abbreviated, portable
from results.runs import RESULT as FORM_OF_RESULT
from results.runs import read_json

EXPORTED = "model.safetensors"  # the weights in an exported folder, and in that of a finished run
METADATA = "paperflows"  # the entry of a safetensors file's metadata that holds `Stored.origin`
# The weights of an objective that belong to its model: a flow, or the network of a regression.
PARTS = ("flow.", "dequantizer.", "network.")
RECORDED = {"experiment", "config", "shape", "commit"}  # in every checkpoint
NEEDED = {
    "experiment",
    "config",
    "shape",
    "n_bits",
    "class_names",
    "commit",
    "parts",
}  # in `origin`
KEPT = NEEDED | {"dirty"}  # of the origin, in a safetensors file
ORIGIN = record(  # the form of `origin`
    {
        "experiment": check(lambda value: isinstance(value, str) and value.isidentifier()),
        "config": record({"data": record({"name": text})}),
        "shape": or_null(list_of(or_null(check(lambda side: isinstance(side, int))))),
        "n_bits": or_null(check(lambda value: isinstance(value, int))),
        "class_names": list_of(text),
        "commit": or_null(text),
        "parts": list_of(text),
    }
)
COMPARISONS = record(  # the part of a result that is not in FORM_OF_RESULT
    optional={"comparisons": list_of(record({"claim": text, "metric": text, "status": text}))}
)
KINDS = (
    "the folder of a run, an exported folder, a checkpoint, or a recorded run such as "
    "glow_cifar10/cpu-seed0"
)


class Stored(NamedTuple):
    """Weights as they were stored, and what is known of them.

    weights: float32 tensors on the CPU, by the keys of the objective's state dict, such as
        "flow.scales.0.weight" and "dequantizer.weight". Buffers of integers keep their dtype.
    origin: a dict with `experiment`, `config` (a dict), `shape` (the shape of one datum, a list),
        `n_bits`, `class_names` (a list), `commit`, and `parts`, the names of the parts of the
        objective that have weights or buffers, such as "flow" and "dequantizer".
    result: the result of the test of exactly these weights, as in result.json; None without a test.
    path: the file from which the weights were read.
    """

    weights: dict[str, Tensor]
    origin: dict[str, Any]
    result: dict[str, Any] | None
    path: Path


def read_stored(model: str | Path) -> Stored:
    """Read trained weights onto the CPU. No code is run from any file.

    model: one of
        the folder of a run, finished or not: the tested weights, or else the newest;
        an exported folder, or its model.safetensors;
        one checkpoint file;
        the name of a recorded run, "<experiment>/<run>", whose weights lie in results/weights/.

    ConfigError, ValueError or FileNotFoundError, one line: there is nothing to load.
    """
    if not isinstance(model, str | os.PathLike):
        raise ValueError(f"{model!r} is neither a path nor a name: give {KINDS}")
    if not os.fspath(model):
        raise ValueError(f"the model is an empty name: give {KINDS}")
    path = expand_home("the model", model)
    if path.is_dir():
        return _of_folder(path)
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    if path.is_file() or path.is_symlink() or path.suffix == ".ckpt":
        return _of_checkpoint_file(path)
    return _of_row(str(model))


def _of_folder(folder: Path) -> Stored:
    """The tested weights of a run or an export; the newest if there is no result or they are gone.

    A run that goes on behind its result may replace or remove the checkpoint that was tested, but
    not its model.safetensors.
    """
    if (folder / EXPORTED).is_file():
        return _of_safetensors(folder / EXPORTED)
    tested = None
    if (folder / RESULT).is_file():
        tested = folder / str(_read_whole_result(folder).get("checkpoint"))
        if tested.exists():
            return _of_checkpoint_file(tested)
    newest = newest_checkpoint(folder)
    if newest is not None:
        return of_checkpoint(*newest)
    if tested is not None:
        _load(tested)  # it raises FileNotFoundError with the file's name
    if any(folder.glob("*.ckpt")):
        raise FileNotFoundError(f"{folder} is not the folder of a run: give {folder.parent}")
    raise FileNotFoundError(
        f"{folder} holds no checkpoint: give the folder of a run, outputs/<experiment>/<run id>"
    )


# ---------------------------------------------------------------------- checkpoints


def _load(path: Path) -> Checkpoint:
    """As `load_checkpoint`, with an advice in its messages."""
    try:
        return load_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"{error}: give {KINDS}") from error


def _of_checkpoint_file(path: Path) -> Stored:
    """The weights of a checkpoint, with the result of its run if exactly they were tested."""
    checkpoint = _load(path)
    folder = path.parent.parent
    if not (folder / RESULT).is_file():
        return of_checkpoint(path, checkpoint)
    result = _read_whole_result(folder)
    is_tested = result.get("checkpoint") == f"{path.parent.name}/{path.name}"
    step = (result.get("tested") or {}).get("step")
    if is_tested and step in (None, checkpoint.get("global_step")):
        return of_checkpoint(path, checkpoint, result)
    return of_checkpoint(path, checkpoint)


def of_checkpoint(
    path: Path, checkpoint: Checkpoint, result: dict[str, Any] | None = None
) -> Stored:
    """The content of a checkpoint, and the result of the test of its weights.

    ConfigError or ValueError, one line: it lacks what every checkpoint records.
    """
    weights = {
        key: _as_float32(value)
        for key, value in checkpoint["state_dict"].items()
        if key.startswith(PARTS)
    }
    recorded = dict(checkpoint["paperflows"])
    missing = sorted(RECORDED - recorded.keys())
    if missing:
        raise ValueError(f"{path} does not record its {', '.join(missing)}: give {KINDS}")
    origin = _known(recorded, path)
    origin["parts"] = sorted({key.partition(".")[0] for key in checkpoint["state_dict"]})
    _check_origin(origin, path)
    return Stored(weights, origin, result, path)


def _as_float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _check_origin(origin: dict[str, Any], path: Path) -> None:
    """ValueError, one line: what a file says of its model has another form than ORIGIN."""
    faults = keys(ORIGIN, origin)
    if faults:
        raise ValueError(
            f"{path} says something of its model that is not understood "
            f"({abbreviated(faults)}): give {KINDS}"
        )


def _read_whole_result(folder: Path) -> dict[str, Any]:
    """The result in a folder. ConfigError, one line: it is damaged, or has another form."""
    advice = "restore it, or rename it to load weights without it"
    try:
        result = read_result(folder)
    except ConfigError as error:
        raise ConfigError(f"{folder / RESULT} is damaged: {advice}") from error
    faults = keys(FORM_OF_RESULT, result) + keys(COMPARISONS, result)
    if isinstance(result.get("run"), str):  # a folder may have a name that no record can have
        faults = [fault for fault in faults if fault != "run"]
    if faults:
        raise ConfigError(
            f"{folder / RESULT} is not a whole result of a run ({abbreviated(faults)}): {advice}"
        )
    return result


def _known(origin: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a checkpoint records. An older one lacks n_bits and class_names: ask the data set.

    ConfigError: the data set is not known.
    """
    if "n_bits" in origin:
        return origin
    section = origin["config"]["data"]
    kind = DATA.get(section["name"])
    if kind is None:
        raise ConfigError(
            f"{path} was trained on data.name={section['name']}, which is not known here: "
            f"use its commit {origin['commit']}"
        )
    n_bits = None
    parameters = inspect.signature(kind).parameters
    if "n_bits" in parameters:
        n_bits = section.get("n_bits", parameters["n_bits"].default)
    names = getattr(kind, "class_names", None) or ()
    return {**origin, "n_bits": n_bits, "class_names": list(names)}


# ---------------------------------------------------------------------- safetensors


def as_safetensors(stored: Stored) -> bytes:
    """The content of a safetensors file with the weights and, as its metadata, the origin.

    Paths of this machine are reduced to their last part.
    """
    tensors = {key: value.contiguous() for key, value in sorted(stored.weights.items())}
    known = {key: value for key, value in stored.origin.items() if key in KEPT}
    return save(tensors, {METADATA: json.dumps(portable(known))})


def exported_weights(path: Path, checkpoint: Checkpoint) -> bytes | None:
    """The content of a safetensors file with a checkpoint's weights; None without a model."""
    stored = of_checkpoint(path, checkpoint)
    if stored.weights:
        return as_safetensors(stored)
    return None


def described(content: bytes, name: str) -> dict[str, Any]:
    """What a result says of a file of weights: its name, SHA-256, size, and the type of floats."""
    return {
        "file": name,
        "sha256": sha256_of(content),
        "bytes": len(content),
        "dtype": "float32",
    }


def sha256_of(content: bytes) -> str:
    """The SHA-256 of a file's content, as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shape_text(shape: Sequence[int | None]) -> str:
    """The shape of one datum as a text.

    >>> shape_text([3, 32, None])
    '3 x 32 x any'
    """
    return " x ".join("any" if side is None else str(side) for side in shape)


def _of_safetensors(path: Path) -> Stored:
    """The weights of a file in an exported folder. It is checked against the result beside it."""
    result = None
    if (path.parent / RESULT).is_file():
        result = _read_whole_result(path.parent)
    weights, origin = _read_safetensors(path, (result or {}).get("weights"))
    _restore_paths(origin["config"], (result or {}).get("config"))
    return Stored(weights, origin, result, path)


def _restore_paths(config: dict[str, Any], recorded: Any) -> None:
    """Give a config the folders of images and `data.cache` of the result beside the weights.

    Keys of folders end with `root`, as `data.root` and `data.test_root`; each is one folder, or a
    list of them.

    The metadata of a file of weights have only their last part, while the result of a run has the
    paths, so that the run can be tested again from any folder. The cache of another machine, of
    which only the last part is known, is left out.
    """
    known: dict[str, Any] = {}
    if isinstance(recorded, dict) and isinstance(recorded.get("data"), dict):
        known = recorded["data"]
    data = config["data"]
    for key, value in known.items():
        if key.endswith("root") and isinstance(value, str | list):
            data[key] = value
    if data.get("cache") is not None:
        cache = known.get("cache")
        data["cache"] = cache if isinstance(cache, str) and os.path.isabs(cache) else None


def _read_safetensors(path: Path, recorded: object) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the origin in a safetensors file.

    recorded: what a result says of the file, a dict with `sha256`; the content is checked against
    it. Anything else: nothing is recorded.

    ValueError, one line: it is damaged, or not of this repository. FileNotFoundError: no file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give {KINDS}")
    if isinstance(recorded, dict) and file_sha256(path) != recorded.get("sha256"):
        raise ValueError(
            f"{path} is not the file whose sha256 is recorded, {recorded.get('sha256')}: "
            "restore it, or export it again"
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        origin = json.loads(metadata.get(METADATA, "null"))
        weights = {key: _as_float32(value) for key, value in load_file(path).items()}
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or export it again") from error
    if not isinstance(origin, dict) or not origin.keys() >= NEEDED:
        raise ValueError(
            f"{path} does not say which model it is of: give a file that python -m "
            "reproduce.export has written"
        )
    _check_origin(origin, path)
    return weights, origin


# ---------------------------------------------------------------------- recorded runs


def _of_row(name: str) -> Stored:
    """The weights of a recorded run. FileNotFoundError, one line: there are none."""
    root = results.ROOT
    path = root / "runs" / f"{name}.json"
    if not (root / "runs").is_dir():
        raise FileNotFoundError(
            f"no model {name}: recorded runs come with a clone of the repository, and this is an "
            "installed copy; give the folder of a run, an exported folder, or a checkpoint"
        )
    if not path.is_file():
        names = [f"{file.parent.name}/{file.stem}" for file in (root / "runs").glob("*/*.json")]
        raise FileNotFoundError(f"no model {name}{nearest(name, names)}: give {KINDS}")
    result = read_json(path)
    recorded = result.get("weights")
    if not isinstance(recorded, dict):
        kept = ", ".join(_rows_with_weights()) or "the folder of a run"
        raise FileNotFoundError(f"the weights of {name} were not kept: give {kept}")
    file = root / recorded["file"]
    weights, origin = _read_safetensors(file, recorded)
    return Stored(weights, origin, result, file)


def _rows_with_weights() -> list[str]:
    """The names of the recorded runs whose weights were kept."""
    files = sorted((results.ROOT / "weights").glob("*/*.safetensors"))
    return [f"{file.parent.name}/{file.stem}" for file in files]
