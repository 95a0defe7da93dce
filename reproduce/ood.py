"""Whether a model's likelihood tells other data from its own, and whether corrected scores do.

python -m reproduce.ood glow_cifar10/cpu-seed0 data.root=data
python -m reproduce.ood outputs/glow_cifar10/RUN data.root=data sets=[constant,noise] n=1000

The model is the folder of a run, an exported folder, a checkpoint, or the name of a recorded run.
Its own test images are compared with other sets of images, by four scores:
  likelihood     bits/dim; the images with the lower likelihood should be the other ones
  corrected      bits/dim minus those of a PNG file, or of a lossless WebP file, of the image
                 (Serrà et al. 2020, arXiv 1909.11480): simple images are likely under most models
  typicality     |bits/dim - their mean over training images|, of single images, and of the means of
                 batches of m images (Nalisnick et al. 2019, arXiv 1906.02994)
For each score and set AUROC is the probability that an image of the set, or a batch, has the higher
score: 1 is told apart, 0.5 not at all, 0 the wrong way round. Its 95 % interval is DeLong's.

The sets are official files in root=, folders of yours, or made. One whose files are not here is
named with what to do, and the others are compared:
  svhn           test_32x32.mat
  cifar10        cifar-10-batches-py/test_batch
  cifar100       cifar-100-python/test
  mnist          t10k-images-idx3-ubyte of MNIST; digits of 28 pixels get a black frame up to 32
  fashion_mnist  the same of Fashion-MNIST
  bsds           crops of the photographs in BSDS500, or in bsds=FOLDER, that are not resized
  constant       images of one colour
  noise          images of uniform noise
  folder         the images in folder=FOLDER, resized and cropped

Each image has one sample of the dequantisation noise, which depends on the seed and on its pixels.
For a class-conditional flow p(image) is the mean over all classes. The figures are written into
out= as JSON at the end, with histograms beside it as SVG. Until then the scores are kept in
<out>.partial, so the same command goes on where it was stopped.

keys:
  sets=[svhn,...]  which sets; the default is all but the model's own data
  n=10000          at most so many images of each set, chosen at random
  m=10             images in a batch, for typicality
  root=FOLDER      of the official files; the default is data.root
  bsds=FOLDER      of photographs, from which crops are cut
  folder=FOLDER    of images
  out=ood.json     the figures
  seed=0           of the noise, and of all choices
  batch_size=64    how many images are computed at once
  device=cpu       or cuda; the default is cuda where there is one
  data.KEY=...     a setting of the model's own data, mostly data.root=FOLDER
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from omegaconf import DictConfig
from PIL import features
from torch.utils.data import Dataset

from datamodules import make_data
from datamodules.checks import expand_home
from datamodules.stateless import n_items
from reproduce import detection
from reproduce.command import command
from reproduce.config import ConfigError, arguments, nearest, parse
from reproduce.evaluate import config_of
from reproduce.model import TrainedModel, load_model
from reproduce.model_command import (
    MODEL,
    at_least,
    device_of,
    fingerprint,
    opening,
    progress_bar,
    read_words,
    repeatable,
)
from reproduce.ood_sets import SETS, ImageSet, Request, chosen, read_sets
from reproduce.provenance import device_name, git_state
from reproduce.score import (
    COMPRESSORS,
    PARTIAL,
    Datum,
    Scores,
    batches,
    check_model,
    compressed_bits_per_dim,
    score,
)
from reproduce.streams import say
from results.drawing import svg
from results.files import portable_text, write_all
from results.ood import KIND, histograms, lines_of, verdict, without_set

DEFAULTS: dict[str, object] = {
    "sets": [],
    "n": 10_000,
    "m": 10,
    "root": "",
    "bsds": "",
    "folder": "",
    "out": "ood.json",
    "seed": 0,
    "batch_size": 64,
    "device": "",
}
DIGITS = 6  # of the recorded figures, after the point
Bits = Mapping[str, np.ndarray]  # of N images, (N,): bits/dim under the model (`bpd`), as PNG, ...


class Own(NamedTuple):
    """The model's own images, each (N, C, H, W), uint8.

    train: those that the entropy is estimated from. held_out: those that thresholds come from, of
    the validation split, or other training images where the run had none. test: those that other
    sets are compared with.
    """

    train: np.ndarray
    held_out: np.ndarray
    test: np.ndarray


def own_images(config: DictConfig, request: Request) -> Own:
    """At most `request.n` images of each split of the model's own data, not augmented.

    FileNotFoundError or ValueError, one line: the data are not there, or a split is too small.
    """
    settings = dict(config.data)
    for key in ("hflip", "random_crop"):
        if key in settings:
            settings[key] = False
    if "shift" in settings:
        settings["shift"] = 0.0
    data = make_data(seed=config.seed, **settings)
    data.prepare_data()
    data.setup("fit")
    n_train = n_items(data.train)
    order = request.random("train").permutation(n_train)
    train = _images(data.train, order[: request.n], config)
    if n_items(data.val):
        numbers = chosen(n_items(data.val), request, "val")
        held_out = _images(data.val, numbers, config)
    else:
        held_out = _images(data.train, order[request.n : 2 * request.n], config)
    test = _images(data.test, chosen(n_items(data.test), request, "test"), config)
    if min(len(train), len(held_out), len(test)) < 2:
        raise ConfigError("the model's own data have fewer than 2 images in a split: give others")
    return Own(train, held_out, test)


def _images(split: Dataset, numbers: Sequence[int] | np.ndarray, config: DictConfig) -> np.ndarray:
    """Some images of a split, (N, C, H, W), uint8 from 0 to 255."""
    n_dropped = 8 - config.data.get("n_bits", 8)
    items = [split[(0, int(number))][0] for number in numbers]
    if not items:
        return np.empty((0,), np.uint8)
    return torch.stack(items).numpy() << n_dropped


# ---------------------------------------------------------------------- scores


def measure(
    model: TrainedModel,
    images: np.ndarray,
    compressors: Sequence[str],
    options: DictConfig,
    scores: Scores,
    bar: Tqdm,
) -> dict[str, np.ndarray]:
    """Bits per dimension of images under the model (`bpd`), and as compressed files, each (N,).

    scores: those that are known already; the others are added to it.
    """
    n_bits = cast("int", model.n_bits)
    keys: list[str] = []
    for batch in batches(
        (Datum(row, image, None) for row, image in enumerate(images)), options.batch_size
    ):
        unknown = {datum.key: datum for datum in batch if datum.key not in scores.values}
        if unknown:
            new = list(unknown.values())
            added: dict[str, list[float]] = {}
            for datum, bits in zip(new, model_bits(model, new, options), strict=True):
                files = [
                    compressed_bits_per_dim(datum.pixels, n_bits, name) for name in compressors
                ]
                added[datum.key] = [bits, *files]
            scores.add(added)
        keys += [datum.key for datum in batch]
        bar.update(len(batch))
    table = np.array([scores.values[key] for key in keys], dtype=np.float64)
    return dict(zip(["bpd", *compressors], table.T, strict=True))


def model_bits(model: TrainedModel, data: Sequence[Datum], options: DictConfig) -> list[float]:
    """Bits per dimension of images with one noise sample each.

    Of a class-conditional flow: -log2 of the mean of p(image | class) over the classes, / D.
    """
    if not model.class_names:
        return [bits for [bits] in score(model, data, options)]
    nats_per_bit = data[0].pixels.size * math.log(2)
    rows = []
    for label in range(len(model.class_names)):
        labelled = [datum._replace(label=label) for datum in data]
        rows.append([bits for [bits] in score(model, labelled, options)])
    log_prob = -nats_per_bit * torch.tensor(rows, dtype=torch.float64)
    mean = log_prob.logsumexp(0) - math.log(len(rows))
    return (-mean / nats_per_bit).tolist()


def image_scores(bits: Bits, entropy: float, m: int) -> dict[str, np.ndarray]:
    """All scores of a set by name, the larger the more other: (N,), or (N // m,) for batches."""
    scores = {"likelihood": bits["bpd"]}
    for name in COMPRESSORS:
        if name in bits:
            scores[f"corrected_{name}"] = bits["bpd"] - bits[name]
    scores["typicality_1"] = detection.typicality(bits["bpd"], entropy, 1)
    scores["typicality_m"] = detection.typicality(bits["bpd"], entropy, m)
    return scores


# ---------------------------------------------------------------------- what is recorded


def rounded(value: float | None) -> float | None:
    """A figure as it is recorded; None if it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return round(float(value), DIGITS)


def averages(bits: Bits, average: Callable[[np.ndarray], float]) -> dict[str, float | None]:
    """The mean or median of each kind of bits/dim, over the images for which it is finite."""
    figures: dict[str, float | None] = {}
    for name, values in bits.items():
        finite = values[np.isfinite(values)]
        figures[name] = rounded(average(finite)) if len(finite) else None
    return figures


def flagged(scores: Mapping[str, np.ndarray], thresholds: Mapping[str, float]) -> dict[str, Any]:
    """The share of images and of batches whose typicality is beyond its threshold."""
    shares: dict[str, float | None] = {}
    for name, limit in thresholds.items():
        values = scores[name]
        shares[name] = rounded(float(np.mean(values > limit))) if len(values) else None
    return shares


def described(bits: Bits) -> dict[str, Any]:
    """What is recorded of the bits per dimension of a set."""
    n_not_finite = int((~np.isfinite(bits["bpd"])).sum())
    return {
        "n": len(bits["bpd"]),
        "not_finite": n_not_finite,
        "means": averages(bits, np.mean),
        "medians": averages(bits, np.median),
    }


def compared(
    other: ImageSet,
    bits: Bits,
    inside: Mapping[str, np.ndarray],
    entropy: float,
    thresholds: Mapping[str, float],
    m: int,
) -> dict[str, Any]:
    """What is recorded of one set. inside: the scores of the model's own test images."""
    outside = image_scores(bits, entropy, m)
    areas: dict[str, Any] = {}
    pictures: dict[str, Any] = {}
    for name, values in outside.items():
        areas[name] = None
        if min(len(values), len(inside[name])) >= 2:
            area = detection.auroc(inside[name], values)
            areas[name] = {key: rounded(value) for key, value in area._asdict().items()}
        if name == "likelihood" or name.startswith("corrected"):
            counts = detection.histogram(inside[name], values)
            if counts is not None:
                ends = {"low": rounded(counts.low), "high": rounded(counts.high)}
                pictures[name] = counts._asdict() | ends
    facts = {
        "name": other.name,
        "title": other.title,
        "preparation": other.preparation,
        "unreadable": other.n_unreadable,
    }
    figures = {"auroc": areas, "flagged": flagged(outside, thresholds), "histograms": pictures}
    return facts | described(bits) | figures


def check_names(names: Sequence[str]) -> None:
    """ConfigError, one line: there is no such set, or one is given twice."""
    for name in names:
        if name not in SETS:
            raise ConfigError(
                f"sets={name} is not known{nearest(name, list(SETS))}: give {', '.join(SETS)}"
            )
    if len(set(names)) < len(names):
        raise ConfigError(f"sets=[{','.join(names)}] has a set twice: give each once")


def default_sets(own: str, folder: str) -> list[str]:
    """All sets but the model's own data; the user's folder where it is given."""
    absent = {own} if folder else {own, "folder"}
    return [name for name in SETS if name not in absent]


def check_out(path: Path) -> None:
    """ConfigError, one line: the file of the figures cannot be replaced, or is something else."""
    advice = "give another out=, as out=ood.json"
    if path.suffix != ".json":
        raise ConfigError(f"out={path} does not end with .json: {advice}")
    if path.is_dir():
        raise ConfigError(f"out={path} is a folder: {advice}")
    picture = path.with_suffix(".svg")
    if not path.exists():
        if picture.exists():
            raise ConfigError(f"{picture} is in the way of the histograms: {advice}")
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ConfigError(f"{path} is no file of this command: {advice}")


def as_json(content: dict[str, Any]) -> str:
    """JSON with a line for each number, and one for each list of numbers."""
    text = json.dumps(content, indent=1, allow_nan=False)
    return re.sub(r"\[[-\d\s.,]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def own_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command line that are settings of the data, `data.KEY=...`, and the others."""
    data = [word for word in words if word.startswith("data.") and "=" in word]
    return data, [word for word in words if word not in data]


def compressors_here() -> list[str]:
    """The compressors that this installation of Pillow has; a line names one that it lacks."""
    if features.check("webp"):
        return list(COMPRESSORS)
    say("Pillow was installed without WebP: scores are corrected by PNG alone")
    return ["png"]


def detect(
    model: TrainedModel,
    own: Own,
    sets: Sequence[ImageSet],
    options: DictConfig,
    scores: Scores,
) -> dict[str, Any]:
    """All figures: of the model's own images, and of each of the other sets."""
    compressors = compressors_here()
    splits = [*own, *(other.images for other in sets)]
    with progress_bar(sum(map(len, splits)), "images") as bar:
        train, held_out, test, *others = [
            measure(model, images, compressors, options, scores, bar) for images in splits
        ]
    finite = train["bpd"][np.isfinite(train["bpd"])]
    if not len(finite):
        raise ValueError("the bits/dim of no training image are finite: give another model")
    entropy = float(finite.mean())
    sizes = {"typicality_1": 1, "typicality_m": options.m}
    thresholds = {
        name: detection.threshold(held_out["bpd"], entropy, m, options.seed)
        for name, m in sizes.items()
    }
    inside = image_scores(test, entropy, options.m)
    correlations = {
        name: rounded(detection.rank_correlation(test["bpd"], test[name])) for name in compressors
    }
    return {
        "training": described(train),
        "held_out": described(held_out),
        "thresholds": {name: rounded(limit) for name, limit in thresholds.items()},
        "inside": described(test)
        | {"flagged": flagged(inside, thresholds), "rank_correlation": correlations},
        "sets": [
            compared(other, bits, inside, entropy, thresholds, options.m)
            for other, bits in zip(sets, others, strict=True)
        ],
    }


def facts(
    model: TrainedModel, name: str, words: Sequence[str], options: DictConfig, device: str
) -> dict[str, Any]:
    """What the figures depend on. name: of the model, as it was given."""
    commit, dirty = git_state()
    packages = ("torch", "numpy", "scikit-learn", "pillow")
    versions = {package: metadata.version(package) for package in packages}
    return {
        "kind": KIND,
        "model": portable_text(name),
        "experiment": model.experiment,
        "data": model.config.data.name,
        "weights": fingerprint(model.stored.weights),
        "command": shlex.join(["python", "-m", "reproduce.ood", *map(portable_text, words)]),
        "n": options.n,
        "m": options.m,
        "seed": options.seed,
        "commit": commit,
        "dirty": dirty,
        "device": device_name(torch.device(device)),
        "versions": versions | {"webp": features.version("webp") or "-"},
    }


@command
def main(argv: list[str] | None = None) -> None:
    """Compare the sets; one line and exit code 1 for a mistake."""
    words = arguments(argv)
    if {"--help", "-h"} & set(words):
        say((__doc__ or "").strip())
        return
    of_data, rest = own_words(words)
    [name], options = read_words(rest, [MODEL], DEFAULTS)
    at_least(options, n=2, m=2, seed=0, batch_size=1)
    check_names(options.sets)
    device = device_of(options.device)
    out = expand_home("out", options.out)
    check_out(out)
    model = load_model(name)
    check_model(model, name)
    options.noise_samples = 1  # as `score` needs it
    config, _ = config_of(model, 0, parse(of_data))
    root = expand_home("root", options.root or config.data.get("root") or "data")
    shape = cast("tuple[int, int, int]", model.shape)
    request = Request(shape, options.n, options.seed, root, options.bsds, options.folder)
    names = list(options.sets) or default_sets(config.data.name, options.folder)
    own = own_images(config, request)
    sets, left_out = read_sets(names, request, config.data.name)
    for missing, advice in left_out.items():
        say(without_set(missing, advice))
    if not sets:
        raise ConfigError("no set is left to compare with: give others, as sets=[constant,noise]")
    settings = {
        "weights": fingerprint(model.stored.weights),
        "seed": options.seed,
        "webp": features.version("webp"),
    }
    partial = out.with_name(f"{out.name}{PARTIAL}")
    with opening(partial):
        scores = Scores(partial, settings)
    model.to(device)
    with repeatable("the same command keeps what is scored, and goes on"):
        figures = detect(model, own, sets, options, scores)
    content = facts(model, name, words, options, device) | figures | {"left_out": list(left_out)}
    with opening(out):
        write_all(
            {
                out: as_json(content),
                out.with_suffix(".svg"): svg(histograms(content)),
            }
        )
    partial.unlink(missing_ok=True)
    say("\n".join(lines_of(content)))
    say(verdict(content))
    say(
        f"{out}: {', '.join(other.name for other in sets)}; histograms in {out.with_suffix('.svg')}"
    )


if __name__ == "__main__":
    main()
