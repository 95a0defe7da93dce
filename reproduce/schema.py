"""The schema of a recipe: which kind of value each of its keys takes.

Four sections of a recipe hold arguments of constructors: `flow` of the model, `data` of the data
module, `optim` and `eval` of the objective. The constructor's signature decides the kinds of these
keys. The table OWN has those of all other keys. A key in neither takes values of the kind of the
first value that a recipe gives it.
"""

import functools
import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

from reproduce.kinds import (
    SIMPLE,
    Anything,
    Choice,
    Devices,
    Either,
    Integer,
    Kind,
    ListOf,
    Nullable,
    Number,
    Share,
    Switch,
    Text,
    Time,
    kind_of_value,
)

PATH = Text("a path", example="outputs/mine")
MODEL = Text("a run's folder, an export, a checkpoint or a recorded run", example="outputs/mine")
CLAIM = Text("a name", r"[A-Za-z_][\w.-]*", example="glow.cifar10")
STEPS = Integer(low=1, example="100")
PRECISION = Choice(
    ("auto", "32-true", "bf16-mixed", "16-mixed"),
    {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"},  # Lightning's other names of these
)
OWN: dict[str, Kind] = {
    "seed": Integer(0, 10**9, example="0"),
    "run_dir": Nullable(PATH),
    "resume": Nullable(Choice(("auto",))),
    "init_from": Nullable(MODEL),
    "paper": Nullable(Either((CLAIM, ListOf(CLAIM)))),
    "data.name": CLAIM,
    "flow.encoder_checkpoint": Nullable(MODEL),
    # Lightning's Trainer accepts more values; these are the ones that work here.
    "trainer.accelerator": Choice(("auto", "cpu", "gpu", "cuda", "mps")),
    "trainer.devices": Devices(),
    "trainer.num_nodes": Integer(low=1, example="1"),
    "trainer.strategy": Choice(("auto", "ddp", "ddp_find_unused_parameters_true")),
    "trainer.precision": PRECISION,
    "trainer.max_steps": Integer(low=-1, example="1000"),
    "trainer.max_epochs": Nullable(Integer(low=-1, example="10")),
    "trainer.max_time": Nullable(Time()),
    "trainer.val_check_interval": STEPS,
    "trainer.limit_val_batches": Nullable(Share()),
    "trainer.limit_test_batches": Nullable(Share()),
    "trainer.log_every_n_steps": STEPS,
    "trainer.deterministic": Either((Switch(), Choice(("warn",)))),
    "trainer.benchmark": Switch(),
    "trainer.compile": Switch(),
    "trainer.cuda_graph": Switch(),
    "trainer.recompute": Switch(),
    "ema.decay": Nullable(Number(low=0, below=1, example="0.999")),
    "samples.temperatures": ListOf(Number(low=0, example="0.7"), least=1),
    "samples.n": Integer(low=1, example="16"),
    "samples.every_n_steps": STEPS,
    "samples.quality_every_n_steps": Nullable(STEPS),
    "quality.n": Integer(low=0, example="50000"),
    "quality.small_n": Integer(low=1000, example="5000"),
    "quality.temperature": Number(low=0, example="1.0"),
    "quality.reference": Choice(("train", "val", "test")),
    "quality.reference_n": Nullable(Integer(low=2, example="10000")),
    "quality.seed": Integer(low=0, example="0"),
    "quality.batch_size": Integer(low=1, example="100"),
    "metrics.inception_weights": Nullable(PATH),
    "metrics.lpips": ListOf(Choice(("alex", "vgg"))),
    "metrics.alexnet_weights": Nullable(PATH),
    "metrics.vgg16_weights": Nullable(PATH),
    "checkpoint.every_n_steps": STEPS,
    "checkpoint.select": Choice(("best", "last")),
    "logger.name": Choice(("wandb", "csv", "none")),
    # W&B refuses longer names of projects, and names with one of these characters.
    "logger.project": Text("a name", r"[^/\\#?%:]+", longest=128, example="paperflows"),
    "logger.weights": Switch(),
    "budget.images": Nullable(Integer(low=1, example="1000000")),
}
ANNOTATED: dict[object, Kind] = {Path: PATH}
ANNOTATED.update(SIMPLE.items())


class Schema:
    """The kinds of the keys of one experiment."""

    def __init__(self, experiment: str) -> None:
        self.kinds = dict(OWN)
        for section, constructor in constructors(experiment).items():
            self.kinds |= _of_section(section, constructor)
        self.learned: dict[str, Kind] = {}

    def use_data(self, name: object) -> None:
        """Replace the keys of the section `data` by those of a data set."""
        from datamodules import DATA

        for key in [key for key in self.kinds if key.startswith("data.")]:
            del self.kinds[key]
        for key in [key for key in self.learned if key.startswith("data.")]:
            del self.learned[key]
        self.kinds["data.name"] = OWN["data.name"]
        if name in DATA:
            self.kinds |= _of_section("data", DATA[str(name)])

    def learn(self, key: str, value: object) -> None:
        """Remember the kind of a key that nothing else decides, by its first value."""
        if key in self.kinds:
            return
        self.learned.setdefault(key, kind_of_value(value))

    def kind(self, key: str) -> Kind:
        return self.kinds.get(key) or self.learned.get(key) or Anything()


def constructors(experiment: str) -> dict[str, object]:
    """The classes to whose constructors the sections of an experiment's recipe go, by section.

    They are read from the script of the experiment. The flow is the annotated return type of its
    `make_flow`; the objective is the one that the script imports. Empty if there is no such script.
    """
    from lightning_modules.objective import Objective

    name = f"reproduce.{experiment}"
    try:
        script = import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return {}
    classes: dict[str, object] = {}
    flow = getattr(getattr(script, "make_flow", None), "__annotations__", {}).get("return")
    if isinstance(flow, type):
        classes["flow"] = flow
    for value in vars(script).values():
        if isinstance(value, type) and issubclass(value, Objective):
            classes["optim"] = value
            classes["eval"] = value
    return classes


def _of_section(section: str, constructor: object) -> dict[str, Kind]:
    """The kind of every argument of a constructor, by the dotted key of the argument."""
    constructor = getattr(constructor, "func", constructor)  # the class in a functools.partial
    if not isinstance(constructor, type):
        return {}
    return {f"{section}.{name}": kind for name, kind in _arguments(constructor).items()}


@functools.cache
def _arguments(constructor: type) -> Mapping[str, Kind]:
    """The kinds of the arguments of a class, by name, also of those that it hands on to a base."""
    kinds: dict[str, Kind] = {}
    for base in reversed(inspect.getmro(constructor)):
        initializer = vars(base).get("__init__")
        if not callable(initializer):
            continue
        for name, parameter in inspect.signature(initializer).parameters.items():
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                kinds[name] = _of_parameter(parameter)
    return kinds


def _of_parameter(parameter: inspect.Parameter) -> Kind:
    """The kind of a parameter: by its annotation or, without one, by its default."""
    if parameter.annotation is not parameter.empty:
        return kind_of(parameter.annotation)
    if parameter.default is not parameter.empty:
        return kind_of_value(parameter.default)
    return Anything()


def kind_of(annotation: object) -> Kind:
    """The kind of an annotation such as `int | None` or `Literal["a", "b"]`."""
    if annotation in ANNOTATED:
        return ANNOTATED[annotation]
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Literal:
        return Choice(tuple(str(name) for name in arguments))
    if origin in (Union, UnionType):
        return _of_union(arguments)
    if isinstance(origin, type) and issubclass(origin, Sequence) and arguments:
        has_length = origin is tuple and ... not in arguments
        return ListOf(kind_of(arguments[0]), n=len(arguments) if has_length else None)
    return Anything()


def _of_union(members: tuple[object, ...]) -> Kind:
    """The kind of `a | b`. A text is tried last, since it would accept every number."""
    kinds = [kind_of(member) for member in members if member is not NoneType]
    known = [kind for kind in kinds if not isinstance(kind, Anything)]
    known.sort(key=lambda kind: isinstance(kind, Text))
    if PATH in known and SIMPLE[str] in known:  # both are texts
        known.remove(SIMPLE[str])
    if not known:
        return Anything()
    kind = known[0] if len(known) == 1 else Either(tuple(known))
    return Nullable(kind) if NoneType in members else kind


# The name of a setting in other programs -> its key here.
ALIASES: Mapping[str, str] = {
    "gradient_clip_val": "optim.clip_norm",
    "gradient_clip": "optim.clip_norm",
    "grad_clip": "optim.clip_norm",
    "clip_grad": "optim.clip_norm",
    "clip_grad_norm": "optim.clip_norm",
    "max_grad_norm": "optim.clip_norm",
    "learning_rate": "optim.lr",
    "lr": "optim.lr",
    "base_lr": "optim.lr",
    "optimizer": "optim.name",
    "optim": "optim.name",
    "scheduler": "optim.schedule",
    "lr_scheduler": "optim.schedule",
    "wd": "optim.weight_decay",
    "beta1": "optim.betas",
    "beta2": "optim.betas",
    "warmup": "optim.warmup_steps",
    "epochs": "trainer.max_epochs",
    "epoch": "trainer.max_epochs",
    "n_epochs": "trainer.max_epochs",
    "num_epochs": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "n_steps": "trainer.max_steps",
    "num_steps": "trainer.max_steps",
    "train_steps": "trainer.max_steps",
    "iterations": "trainer.max_steps",
    "n_iter": "trainer.max_steps",
    "gpus": "trainer.devices",
    "gpu": "trainer.devices",
    "n_gpus": "trainer.devices",
    "num_gpus": "trainer.devices",
    "tpu_cores": "trainer.accelerator",
    "device": "trainer.accelerator",
    "nodes": "trainer.num_nodes",
    "nnodes": "trainer.num_nodes",
    "amp": "trainer.precision",
    "fp16": "trainer.precision",
    "bf16": "trainer.precision",
    "dtype": "trainer.precision",
    "check_val_every_n_epoch": "trainer.val_check_interval",
    "eval_interval": "trainer.val_check_interval",
    "log_interval": "trainer.log_every_n_steps",
    "gradient_checkpointing": "trainer.recompute",
    "accumulate_grad_batches": "data.micro_batch",
    "gradient_accumulation_steps": "data.micro_batch",
    "batch": "data.batch_size",
    "batch_size": "data.batch_size",
    "bs": "data.batch_size",
    "train_batch_size": "data.batch_size",
    "workers": "data.num_workers",
    "dataset": "data.name",
    "data_dir": "data.root",
    "data_path": "data.root",
    "dataroot": "data.root",
    "image_size": "data.size",
    "img_size": "data.size",
    "n_bits_x": "data.n_bits",
    "seed_everything": "seed",
    "random_seed": "seed",
    "manual_seed": "seed",
    "default_root_dir": "run_dir",
    "output_dir": "run_dir",
    "out_dir": "run_dir",
    "log_dir": "run_dir",
    "save_dir": "run_dir",
    "ckpt_path": "resume",
    "resume_from_checkpoint": "resume",
    "load_from": "init_from",
    "load_weights": "init_from",
    "pretrained": "init_from",
    "pretrained_path": "init_from",
    "finetune": "init_from",
    "fine_tune": "init_from",
    "init_checkpoint": "init_from",
    "ema_decay": "ema.decay",
    "temperature": "samples.temperatures",
    "save_every": "checkpoint.every_n_steps",
    "every_n_train_steps": "checkpoint.every_n_steps",
    "save_top_k": "checkpoint.select",
    "wandb_project": "logger.project",
    "width": "flow.hidden_channels",
    "hidden": "flow.hidden_channels",
    "hidden_size": "flow.hidden_channels",
    "n_flow": "flow.depth",
    "n_block": "flow.n_levels",
}
