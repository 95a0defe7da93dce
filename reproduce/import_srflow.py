"""Import a checkpoint that SRFlow's authors released, or that their code has saved.

python -m reproduce.import_srflow SRFlow_DF2K_4X.pth out=srflow-df2k-x4
python -m reproduce.import_srflow SRFlow_DF2K_4X.pth out=tested data.test_root=data/DIV2K_valid_HR

FILE is SRFlow_*.pth or RRDB_*.pth of the repository andreas128/SRFlow (Lugmayr et al. 2020, arXiv
2006.14200): a flow, or an encoder that was trained alone, from which flow.encoder_checkpoint=FOLDER
starts a flow. No such file comes with this repository, and the weights have a licence of their own:
CC BY-NC-SA 4.0, not for commercial use. The new folder is as those of reproduce.export, so that the
commands on a model take it, and reproduce.load takes a flow:
  model.safetensors  the weights, float32, with the names that they have here
  config.yaml        the recipe: that of the paper, with the settings of the file
  import.json        what was imported, and what was checked
  result.json        with test=true: the figures of a test, which `python -m results add FOLDER`
                     adds to the results page
  README.md          a model card
No code is run from the file. The matrices of the 1x1 convolutions stay as they are
(flow.permutation=invertible_plain): as an LU decomposition they would be rounded anew.

Before anything is written, the model is checked on crops of the photographs inside scikit-image and
scikit-learn. A flow's images have to come back from their latents, and its log-determinant has to
be that of the Jacobian matrix, which is computed by autograd for a small crop. The numbers are
printed. Among them is the PSNR between the low-resolution image and that of a sample, which for the
released flows is about 50 dB.

keys:
  out=FOLDER    a new folder
  stacked=[]    the numbers of the encoder's blocks whose outputs are features, which the file does
                not tell; empty: as released, 1, 8, 15, 22 for 4 times as large and 1, 3, 5, 7 for 8
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import functools
import json
import math
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any, cast

import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor, nn

import results
from datamodules.bicubic import downscale
from datamodules.checks import expand_home, is_whole
from datamodules.photos import photographs
from flows.caching import cached
from flows.srflow import RRDB, SRFlow
from lightning_modules.precision import evaluation
from lightning_modules.quality.super_resolution import as_uint8, low_res_psnr, psnr_rgb
from reproduce.command import command
from reproduce.config import ConfigError, arguments, compose, parse, plain
from reproduce.evaluate import OF_RECIPE, config_of, evaluate, table
from reproduce.experiment import papers_of
from reproduce.export import exported
from reproduce.model import StoredModel, stored_model
from reproduce.model_command import device_of, opening, progress_bar, read_words, repeatable
from reproduce.provenance import PACKAGES, device_name, git_state
from reproduce.released_srflow import Released, Weights, read_released, released_model, renamed
from reproduce.stored import Stored, file_sha256
from reproduce.streams import say
from results.files import write_all

DEFAULTS: dict[str, object] = {"out": "", "stacked": [], "test": False, "device": ""}
FILE = "FILE"  # the word of the command line
RECORD = "import.json"
LICENCE = "CC BY-NC-SA 4.0, as the authors' repository states"
SIDE = 160  # pixels of the crops, as in the paper
N_EXACT = 2  # crops that are also computed in float64, which takes ten times as long
EXACT_SIDE = 64  # pixels of these
TEMPERATURE = 0.9
VISIBLE = 0.5 / 255  # of x: half a grey level
TOLERANCE = 1e-4  # of x, and of the log-determinant relative to its size; in float64
LEVELS = 255


def stored_of(path: Path, weights: Weights, released: Released) -> Stored:
    """The weights of a file as those of a model of this repository.

    ConfigError, one line: keys are missing or not known, or tensors have other shapes.
    """
    own = renamed(released, weights, path)
    experiment = released.experiment
    config = plain(compose(experiment, []))
    config["flow"] |= released.settings
    config["data"] |= {"root": None, "val_root": None, "n_val": 0, "num_workers": 0}
    if released.kind == "flow":
        config["optim"] |= {"noise": "none", "encoder_frozen_until": 0.0}
    config["imported"] = {
        "file": path.name,
        "sha256": file_sha256(path),
        "bytes": path.stat().st_size,
        "licence": LICENCE,
    }
    commit, dirty = git_state()
    crop = config["data"]["crop"]
    origin = {
        "experiment": experiment,
        "config": config,
        "shape": [3, crop, crop],
        "n_bits": 8,
        "class_names": [],
        "commit": commit,
        "dirty": dirty,
        "parts": [released.kind],
    }
    return Stored({f"{released.kind}.{key}": own[key] for key in own}, origin, None, path)


# ---------------------------------------------------------------------- the checks


def crops(side: int) -> Tensor:
    """The middle of each photograph, (n, 3, side, side) uint8."""
    photos = [torch.from_numpy(photo.copy()).permute(2, 0, 1) for photo in photographs()]
    return torch.cat([middle(photo[None], side) for photo in photos])


def middle(images: Tensor, side: int) -> Tensor:
    """The middle of images, (n, C, side, side)."""
    top = (images.shape[2] - side) // 2
    left = (images.shape[3] - side) // 2
    return images[:, :, top : top + side, left : left + side]


def check(flow: SRFlow) -> dict[str, float]:
    """What the weights of a flow, in eval mode, give on real crops.

    float32_error, float64_error: the largest |x - f^-1(f(x))|, where x is in [0, 1].
    log_det_error: the largest difference between the log-determinants of f and f^-1, and between
        those of f and of its Jacobian matrix, relative to the log-determinant; float64.
    release_bits: bits of -log p(x) a pixel, as the authors' code reports.
    lr_psnr: the PSNR in dB between the low-resolution image and that of a sample (temperature 0.9);
        NaN if a sample is not finite.

    ConfigError, one line: the flow cannot be inverted, or its log-determinant is wrong.
    """
    images = crops(SIDE // flow.scale * flow.scale)
    exact_images = middle(images[:N_EXACT], EXACT_SIDE)
    smallest = middle(images[:1], max(2**flow.n_levels, flow.scale))
    with (
        evaluation("cpu"),
        torch.no_grad(),
        progress_bar(len(images) + len(exact_images) + 1, "checks") as bar,
    ):
        rows = []
        for image in images.split(1):
            rows.append(_sampled(flow, image) | _measured(flow, image, "float32_error"))
            bar.update()
        flow.double()
        for image in exact_images.split(1):
            rows.append(_measured(flow, image, "float64_error", "log_det_error"))
            bar.update()
        rows.append({"log_det_error": jacobian_error(flow, smallest)})
        bar.update()
        flow.float()
    found = {
        key: max((row[key] for row in rows if key in row), key=_badness)
        for key in ("float32_error", "float64_error", "log_det_error")
    }
    for key in ("release_bits", "lr_psnr"):
        values = [row[key] for row in rows if key in row]
        found[key] = math.fsum(values) / len(values)
    return found


def _badness(value: float) -> float:
    """For `max`: what is not a number is worse than any number."""
    return math.inf if math.isnan(value) else value


def _inputs(flow: SRFlow, image: Tensor) -> tuple[Tensor, Tensor]:
    """x and low_res of an image, (1, 3, H, W) uint8, in the dtype of the flow."""
    dtype = next(flow.parameters()).dtype
    low_res = downscale(image, flow.scale)
    return image.to(dtype) / LEVELS, low_res.to(dtype) / LEVELS


def _measured(flow: SRFlow, image: Tensor, error: str, of_log_det: str = "") -> dict[str, float]:
    """The errors of one image by the names `error` and, unless it is empty, `of_log_det`."""
    x, low_res = _inputs(flow, image)
    with cached(flow):
        encoding = flow.encode_context(low_res)
        latents, log_det = flow(x, encoding)
        back, inverse_log_det = flow.inverse(latents, encoding)
    row = {error: (x - back).abs().max().item()}
    if of_log_det:
        row[of_log_det] = ((log_det + inverse_log_det) / log_det.abs().clamp(min=1)).abs().item()
    else:
        log_prob = flow.base.log_prob(latents) + log_det
        row["release_bits"] = -log_prob.item() / (image.shape[2] * image.shape[3] * math.log(2))
    return row


def _sampled(flow: SRFlow, image: Tensor) -> dict[str, float]:
    """The PSNR between an image and a sample, both reduced. NaN: the sample is not finite."""
    _, low_res = _inputs(flow, image)
    generator = torch.Generator().manual_seed(0)
    sample = flow.sample(1, TEMPERATURE, low_res, generator=generator)[0]
    if not sample.isfinite().all():
        return {"lr_psnr": math.nan}
    reduce = functools.partial(downscale, scale=flow.scale)
    return {"lr_psnr": low_res_psnr(as_uint8(sample), reduce(image), reduce).item()}


def jacobian_error(flow: SRFlow, image: Tensor) -> float:
    """How much log_det differs from ln|det| of the Jacobian matrix, relative to its size.

    image: (1, 3, H, W) uint8, of few pixels: the matrix has (3 H W)^2 elements.
    """
    x, low_res = _inputs(flow, image)
    encoding = flow.encode_context(low_res)

    def flat(values: Tensor) -> Tensor:
        latents, _ = flow(values.view_as(x), encoding)
        return torch.cat([level.flatten() for level in latents])

    jacobian = torch.func.jacrev(flat, chunk_size=64)(x.flatten())
    _, log_det = flow(x, encoding)
    difference = torch.linalg.slogdet(jacobian).logabsdet - log_det[0]
    return (difference / log_det[0].abs().clamp(min=1)).abs().item()


def check_rrdb(network: RRDB) -> dict[str, float]:
    """What the weights of an RRDB give on real crops.

    psnr: to the true image, in dB. lr_psnr: as in `check`. NaN if an image is not finite.
    """
    scale = network.encoder.scale
    reduce = functools.partial(downscale, scale=scale)
    images = crops(SIDE // scale * scale)
    with evaluation("cpu"), torch.no_grad():
        made = torch.cat([network(reduce(image).float() / LEVELS) for image in images.split(1)])
    if not made.isfinite().all():
        return {"psnr": math.nan, "lr_psnr": math.nan}
    made = as_uint8(made)
    return {
        "psnr": psnr_rgb(made, images).mean().item(),
        "lr_psnr": low_res_psnr(made, reduce(images), reduce).mean().item(),
    }


def checked(network: nn.Module, path: Path) -> dict[str, float]:
    """What `check` or `check_rrdb` finds. ConfigError, one line: it is not what is due."""
    if not isinstance(network, SRFlow):
        found = check_rrdb(cast(RRDB, network))
        if math.isnan(found["psnr"]):
            raise ConfigError(f"{path} makes images that are not finite; nothing was written")
        return found
    found = check(network)
    for key in ("float64_error", "log_det_error"):
        if not found[key] <= TOLERANCE:
            raise ConfigError(
                f"{path} makes no flow that can be inverted exactly: {key} is {found[key]:.3g} on "
                f"real photographs, and at most {TOLERANCE} are due; nothing was written"
            )
    return found


# ---------------------------------------------------------------------- the test


def with_result(model: StoredModel, config: DictConfig, device: str, run: str) -> Stored:
    """The weights with the result of a test, as a run records it. Nothing was trained.

    config: the recipe of the test. device: "cpu" or "cuda". run: the name of the row.
    ValueError or FileNotFoundError, one line: there are no such images.
    """
    start = time.monotonic()
    evaluation = evaluate(model, config, device)
    versions = {name: metadata.version(name) for name in PACKAGES}
    origin = model.stored.origin | {"config": plain(config)}
    result: dict[str, Any] = {
        "experiment": model.experiment,
        "run": run,
        "preset": None,
        "metrics": finite_or_null(evaluation.figures),
        "protocol": evaluation.protocol,
        "not_measured": evaluation.not_measured,
        "papers": papers_of(config),
        "budget": None,  # the file does not tell how long its weights were trained
        "seed": config.seed,
        "commit": origin["commit"],
        "dirty": origin["dirty"],
        "config": origin["config"],
        "versions": {"python": sys.version.split()[0], **versions},
        "device": device_name(torch.device(device)),
        "precision": "32-true",
        "tf32": False,
        "deterministic": False,
        "images": 0,
        "seconds": round(time.monotonic() - start, 1),
        "n_train": None,
        "parameters": sum(parameter.numel() for parameter in model.network.parameters()),
    }
    if evaluation.content_hash is not None:
        result["data"] = {"sha256": evaluation.content_hash}
    result |= results.compare_all(result)
    say(f"{table(config, evaluation, None)}\n")
    return model.stored._replace(origin=origin, result=result)


def finite_or_null(figures: Mapping[str, float]) -> dict[str, float | None]:
    """Figures for JSON, which has no NaN and no infinity: they become None.

    >>> finite_or_null({"a": 1.0, "b": math.nan})
    {'a': 1.0, 'b': None}
    """
    return {key: value if math.isfinite(value) else None for key, value in figures.items()}


# ---------------------------------------------------------------------- the command


def read_options(words: list[str]) -> tuple[Path, Path, tuple[int, ...], DictConfig]:
    """The file, the new folder, `stacked`, and all options. ConfigError: a mistake in them."""
    [name], options = read_words(words, [FILE], DEFAULTS)
    if not options.out:
        raise ConfigError("out= is missing: give a new folder, as out=srflow-df2k-x4")
    stacked = options.stacked
    if isinstance(stacked, int):
        stacked = [stacked]
    if not isinstance(stacked, list | ListConfig) or not all(map(is_whole, stacked)):
        raise ConfigError(f"stacked={stacked}: give the numbers of blocks, as stacked=[1,8,15,22]")
    options.device = device_of(options.device)
    return expand_home(FILE, name), expand_home("out", options.out), tuple(stacked), options


def check_out(out: Path) -> None:
    """ConfigError, one line: the folder is not new."""
    if out.is_symlink() or out.is_file():
        raise ConfigError(f"out={out} is no folder: give a new one")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"out={out} holds files already: give a new folder")


@command
def main(argv: list[str] | None = None) -> None:
    """Check the file and write the folder; one line and exit code 1 for a mistake."""
    words = arguments(argv)
    if {"--help", "-h"} & set(words):
        say((__doc__ or "").strip())
        return
    is_of_test = [word.startswith(OF_RECIPE) and "=" in word for word in words]
    texts = parse([word for word, belongs in zip(words, is_of_test, strict=True) if belongs])
    rest = [word for word, belongs in zip(words, is_of_test, strict=True) if not belongs]
    path, out, stacked, options = read_options(rest)
    check_out(out)
    weights = read_released(path)
    released = released_model(weights, path, stacked)
    model = stored_model(stored_of(path, weights, released))
    config, _ = config_of(model, 0, texts)
    with repeatable("nothing was written, the same command starts again"):
        found = checked(model.network, path)
        if options.test or texts:
            model = stored_model(with_result(model, config, options.device, out.name))
    record = model.stored.origin["config"]["imported"] | {
        "tensors": len(weights),
        "parameters": sum(parameter.numel() for parameter in model.network.parameters()),
        "settings": released.settings,
        "checks": finite_or_null(found),
    }
    files: dict[str, bytes] = exported(model)
    files[RECORD] = f"{json.dumps(record, indent=1)}\n".encode()
    with opening(out):
        write_all({out / name: content for name, content in files.items()})
    if not found.get("float32_error", 0) <= VISIBLE:
        say(
            "in float32 images do not come back exactly from their latents "
            f"({found['float32_error']:.2g}): use model.flow.double() where that matters"
        )
    use = {
        "flow": f'load it with reproduce.load("{out}")',
        "network": f"start a flow from it with flow.encoder_checkpoint={out}",
    }
    say(
        *(f"{key}: {value:.4g}" for key, value in found.items()),
        f"{out}: {', '.join(files)}; {use[released.kind]}",
    )


if __name__ == "__main__":
    main()
