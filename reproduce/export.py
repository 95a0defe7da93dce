"""Export a trained model as a folder that can be shared, for example on a model hub.

python -m reproduce.export outputs/realnvp_cifar10/20261122-231500-ab12   # into its folder export/
python -m reproduce.export glow_cifar10/cpu-seed0 out=glow-cifar10        # a recorded run

MODEL is the folder of a run, a checkpoint file, an exported folder or the name of a recorded run.
The folder gets
  model.safetensors  the weights, float32, and as metadata what is needed to build the model
  config.yaml        the recipe of the run, to read; the model is built from the metadata
  result.json        the result of the test of these weights, if they were tested
  README.md          a model card: what it is, its number beside the paper's, protocol, data
and `reproduce.load` loads it. Paths of this machine are reduced to their last part.

keys: out=FOLDER (default: <run folder>/export)
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
from typing import Any

import yaml
from omegaconf import OmegaConf

import results
from datamodules.checks import expand_home
from reproduce.command import command
from reproduce.config import ConfigError, arguments
from reproduce.model import StoredModel, TrainedModel, stored_model
from reproduce.model_command import MODEL, opening, read_words
from reproduce.run_folder import RESULT
from reproduce.stored import EXPORTED, as_safetensors, described, read_stored, shape_text
from reproduce.streams import say
from results.files import portable, write_all
from results.formats import budget, commit, fixed, table

DEFAULTS: dict[str, object] = {"out": ""}
CONFIG = "config.yaml"
CARD = "README.md"
OF_A_RUN = ("checkpoints", "curve.csv", "log.txt")  # what a run's folder holds, and an export not
SOURCE = "paperflows"
DATA_SETS = {  # what a model card says of the data, by data.name
    "cifar10": (
        "CIFAR-10 (Krizhevsky 2009): 32 x 32 colour photographs of ten classes. Its authors state "
        "no licence; they ask to cite their report."
    ),
    "mnist": (
        "MNIST (LeCun, Cortes and Burges): 28 x 28 grey images of handwritten digits. It is "
        "commonly distributed under CC BY-SA 3.0."
    ),
    "fashion_mnist": (
        "Fashion-MNIST (Xiao, Rasul and Vollgraf 2017): 28 x 28 grey images of clothing. Its "
        "licence is MIT."
    ),
    "photos": (
        "Crops of the few photographs that come with scikit-image and scikit-learn, each of which "
        "has a licence of its own. The two packages list them."
    ),
    "super_resolution": (
        "Photographs and their low-resolution images. They are not published with the model, and "
        "their licence is known to those who trained it; without data.root they are the few "
        "photographs that come with scikit-image and scikit-learn."
    ),
    "two_moons": "Points in the plane, which are drawn by scikit-learn. There is no licence.",
    "folder": (
        "A folder of images that is not published with the model. Its licence is known to those "
        "who trained the model."
    ),
}
STATUS = {
    "reproduced": "as good as the paper's number, or within its tolerance",
    "gap": "worse than the paper's number, after as much training",
    "shortened": "worse than the paper's number, after less training",
    "other protocol": "measured in another way than the paper's number: not compared",
    "not measured": "this run did not measure it",
}


def exported(model: StoredModel) -> dict[str, bytes]:
    """The files of an exported folder: their content by name."""
    weights = as_safetensors(model.stored)
    entry = described(weights, EXPORTED)
    files = {EXPORTED: weights, CONFIG: _config(model).encode()}
    result = None
    if model.result is not None:
        result = portable({**model.result, "weights": entry})
        content = json.dumps(result, indent=1, sort_keys=True, allow_nan=False)
        files[RESULT] = f"{content}\n".encode()
    files[CARD] = card(model, result, entry).encode()
    return files


def _config(model: StoredModel) -> str:
    origin = portable(model.stored.origin)
    keys = ("shape", "n_bits", "class_names", "commit", "dirty")
    known = {key: origin.get(key) for key in keys}
    return (
        "# The recipe of model.safetensors. The file's own metadata hold it too: a change here\n"
        "# changes nothing.\n"
        + OmegaConf.to_yaml(OmegaConf.create({**origin["config"], "origin": known}))
    )


# ---------------------------------------------------------------------- the model card


def card(model: StoredModel, result: dict[str, Any] | None, entry: dict[str, Any]) -> str:
    """The model card, Markdown with a head of YAML, as model hubs read it.

    Args:
        model: the model.
        result: the result of its test, or None.
        entry: what is known of the file of weights (`described`).
    """
    network = type(model.network).__name__
    run = result["run"] if result else model.stored.path.stem
    lines = [
        *_head(model),
        f"# {network}: {model.experiment}, {run}",
        "",
        _summary(model),
        "",
        *_numbers(result),
        *_use(model),
        *_training(model, result),
        *_data(model, result),
        *_files(model, result, entry),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def _head(model: StoredModel) -> list[str]:
    tags = [type(model.network).__name__.lower()]
    if isinstance(model, TrainedModel):
        tags = ["normalizing-flow", "density-estimation", *tags]
    if scale_of(model) is not None:
        tags = ["super-resolution", *tags]
    head: dict[str, Any] = {"library_name": SOURCE, "tags": tags}
    if scale_of(model) is not None:
        head["pipeline_tag"] = "image-to-image"
    elif len(model.shape) == 3:
        head["pipeline_tag"] = "unconditional-image-generation"
    return ["---", yaml.safe_dump(head, sort_keys=False).rstrip("\n"), "---", ""]


def _summary(model: StoredModel) -> str:
    """What the model is, in two or three sentences."""
    n_parameters = sum(parameter.numel() for parameter in model.network.parameters())
    if scale_of(model) is not None:
        return _summary_of_enlarging(model, n_parameters)
    shape = shape_text(model.shape)
    kind = f"data of shape {shape}"
    if len(model.shape) == 3:
        kind = f"images of {shape} (channels, height, width) with {model.n_bits} bits a value"
    if model.n_bits is None:
        kind = f"data of shape {shape}, real numbers"
    text = (
        f"A normalizing flow with {n_parameters:,} parameters. It models the density of {kind}: it "
        "computes the likelihood of data, and draws samples."
    )
    if model.class_names:
        text += f" It is conditioned on a class: {', '.join(model.class_names)}."
    return text


def scale_of(model: StoredModel) -> int | None:
    """How many times as high and wide a super-resolution model makes images; None for others."""
    return getattr(model.objective, "scale", None)


def _summary_of_enlarging(model: StoredModel, n_parameters: int) -> str:
    """The same for a super-resolution model."""
    times = f"{scale_of(model)} times as high and wide"
    if isinstance(model, TrainedModel):
        return (
            f"A conditional normalizing flow with {n_parameters:,} parameters. It models the "
            f"density of photographs {times} as a given one, of any size: it draws different "
            "photographs for it, and computes their likelihood."
        )
    return (
        f"A network with {n_parameters:,} parameters, which makes photographs of any size {times}: "
        "one for each."
    )


def _numbers(result: dict[str, Any] | None) -> list[str]:
    """The section with the numbers beside the paper's, and how they were measured."""
    lines = ["## Numbers", ""]
    if result is None:
        return [*lines, "These weights were not tested.", ""]
    claims = results.load_claims()
    compared = [
        each
        for each in result.get("comparisons", ())
        if each["status"] != "-" and each["claim"] in claims
    ]
    titles = {stem: paper["title"] for stem, paper in results.load_papers().items()}
    by_metric = {each["metric"]: each for each in compared}
    rows = []
    for metric in sorted({*by_metric, *_tested(result)}):
        ours = fixed(result["metrics"].get(metric), ".4f")
        each = by_metric.get(metric)
        if each is None:
            rows.append([metric, ours, "-", "-", "-"])
            continue
        claim = claims[each["claim"]]
        place = f"{titles[claim['id'].partition('.')[0]]}, {claim['table']}, {claim['row']}"
        rows.append([metric, ours, results.printed(claim["value"], claim), place, each["status"]])
    lines += table(["metric", "this model", "paper", "where", "status"], rows)
    statuses = {each["status"] for each in compared}
    explained = [f"* `{word}`: {STATUS[word]}." for word in STATUS if word in statuses]
    reasons = [
        f"* `{each['metric']}`: {words}."
        for each in compared
        for words in (*each.get("differences", []), each.get("reason"))
        if words
    ]
    if explained:
        lines += [*explained, *reasons, ""]
    tested = result.get("tested")
    if tested:
        choice = "the best by validation" if tested["chosen"] == "best" else "the last"
        lines += [
            f"Tested: {tested['weights']} weights of step {tested['step']}, {choice}. "
            f"Training saw {budget(result)}.",
            "",
        ]
    for claim_id in dict.fromkeys(each["claim"] for each in compared):
        protocol = claims[claim_id]["protocol"]
        words = "; ".join(f"{key}: {value}" for key, value in protocol.items())
        lines += [f"Protocol of {claim_id}: {' '.join(words.split())}.", ""]
    return lines


def _tested(result: dict[str, Any]) -> list[str]:
    return [key for key in result["metrics"] if key.startswith("test/")]


def _use(model: StoredModel) -> list[str]:
    if scale_of(model) is not None:
        return _use_for_enlarging()
    lines = [
        "## Use",
        "",
        f"With a clone of {SOURCE} that is installed (`pip install -e .`):",
        "",
        "```python",
        "from reproduce import load",
        "",
        'model = load("FOLDER")  # this folder',
    ]
    if model.n_bits is not None:
        lines += [
            "images = model.sample(16, temperature=0.7)  # uint8",
            f"model.bits_per_dim(images{', labels' if model.class_names else ''})",
        ]
    else:
        lines += ["points = model.draw(16)", "model.flow.log_prob(points)  # nats"]
    return [*lines, "```", ""]


def _use_for_enlarging() -> list[str]:
    return [
        "## Use",
        "",
        f"With a clone of {SOURCE} that is installed (`pip install -e .`), for this folder:",
        "",
        "```bash",
        "python -m reproduce.upscale FOLDER image.png out=enlarged",
        "```",
        "",
    ]


def _training(model: StoredModel, result: dict[str, Any] | None) -> list[str]:
    known = {"commit": model.commit, "dirty": bool(model.stored.origin.get("dirty"))}
    imported = model.config.get("imported")
    if imported is not None:
        return [
            "## Origin",
            "",
            f"These weights were not trained with {SOURCE}. They were imported, at commit "
            f"{commit(known)}, from the file `{imported.file}` (SHA-256 `{imported.sha256}`) of "
            "SRFlow's authors or their code. The layers are those of the file; the sections `data` "
            f"and `optim` of `{CONFIG}` are those of the recipe `{model.experiment}`, and say "
            "nothing of how the weights were trained.",
            "",
        ]
    lines = [
        "## Training",
        "",
        f"The recipe `{model.experiment}` of {SOURCE}, in full in `{CONFIG}`; commit "
        f"{commit(known)}.",
    ]
    if result is not None:
        words = result.get("overrides") or []
        lines += [
            "",
            "```bash",
            " ".join(["python", f"reproduce/{model.experiment}.py", *words]),
            "```",
            "",
            f"On {result['device']}, in {result['precision']}, with seed {result['seed']}.",
        ]
        for key, what in (("init_from", "It"), ("encoder", "Its encoder")):
            start = result.get(key)
            if start:
                lines[-1] += (
                    f" {what} started from the trained weights of {start['model']} (SHA-256 "
                    f"`{start['sha256']}`)."
                )
    return [*lines, ""]


def _data(model: StoredModel, result: dict[str, Any] | None) -> list[str]:
    name = model.config.data.name
    if model.config.get("imported") is not None:
        return []
    lines = ["## Data", "", DATA_SETS.get(name, f"The data set {name}."), ""]
    content = (result or {}).get("data") or {}
    if content.get("sha256"):
        lines += [f"SHA-256 of the images: `{content['sha256']}`.", ""]
    return lines


def _files(model: StoredModel, result: dict[str, Any] | None, entry: dict[str, Any]) -> list[str]:
    rows = [
        [EXPORTED, f"the weights, {entry['dtype']}, {entry['bytes']:,} bytes"],
        [CONFIG, "the recipe"],
    ]
    if result is not None:
        rows.append([RESULT, "metrics, versions, curve and settings of the run"])
    licence = "Before you upload the weights, choose their licence, with that of the data in mind."
    imported = model.config.get("imported")
    if imported is not None:
        licence = f"The weights have a licence of their own: {imported.licence}."
    return [
        "## Files",
        "",
        *table(["file", "content"], rows),
        f"SHA-256 of {EXPORTED}: `{entry['sha256']}`",
        "",
        f"The code of {SOURCE} is under Apache-2.0. {licence}",
    ]


# ---------------------------------------------------------------------- the command


def read_options(words: list[str]) -> tuple[str, str]:
    """Read the command line: the model, and out=, or "". ConfigError: a mistake in them."""
    [name], options = read_words(words, [MODEL], DEFAULTS)
    return name, options.out


def out_of(name: str, out: str) -> Path:
    """The folder to write: out=, or export/ in the folder of a run. ConfigError: there is none."""
    if out:
        return expand_home("out", out)
    folder = expand_home("the model", name)
    if not any((folder / part).exists() for part in OF_A_RUN):
        raise ConfigError(f"{name} is not the folder of a run: add out=FOLDER")
    return folder / "export"


def check_out(out: Path, files: dict[str, bytes]) -> None:
    """Refuse a folder whose files would be lost. ConfigError, one line."""
    if out.is_file():
        raise ConfigError(f"out={out} is a file: give a folder")
    if any((out / name).exists() for name in OF_A_RUN):
        raise ConfigError(f"out={out} is the folder of a run: give another one")
    weights = out / EXPORTED
    if weights.is_file():
        if weights.read_bytes() != files[EXPORTED]:
            raise ConfigError(f"out={out} holds another model: give another folder, or delete it")
        return
    foreign = [name for name in files if (out / name).exists()]
    if foreign:
        raise ConfigError(f"out={out} holds a {foreign[0]} already: give another folder")


@command
def main(argv: list[str] | None = None) -> None:
    """Write the folder; one line and exit code 1 for a mistake."""
    words = arguments(argv)
    if {"--help", "-h"} & set(words):
        say((__doc__ or "").strip())
        return
    name, given = read_options(words)
    stored = read_stored(name)
    out = out_of(name, given)
    model = stored_model(stored)
    files = exported(model)
    check_out(out, files)
    with opening(out):
        write_all({out / file: content for file, content in files.items()})
    advice = ""
    if isinstance(model, TrainedModel):
        advice = f'; load it with reproduce.load("{out}")'
    say(f"{out}: {', '.join(files)}{advice}")


if __name__ == "__main__":
    main()
