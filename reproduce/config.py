"""Recipes: OmegaConf files composed, overridden from the command line, and checked. Nothing here knows a model."""

import copy
import difflib
import re
import sys
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CHOICES = {
    "logger.name": ("wandb", "csv", "none"),
    "checkpoint.select": ("best", "last"),
    "resume": (None, "auto"),
}
OPEN = (
    "flow",
    "data",
    "optim",
)  # sections that a recipe may add keys to: the arguments of what it chooses


class ConfigError(Exception):
    """A mistake of the user's: one line that says what to do."""


def compose(experiment: str, arguments: list[str]) -> DictConfig:
    """The recipe `experiment` over its bases, then its data set and preset, then `key=value` arguments.

    data.name and preset are read first, since they bring sections of their own; from then on no key may be new and
    no value may change its type.
    """
    overrides = parse(arguments)
    preset = OmegaConf.select(overrides, "preset")
    files = _files(f"{experiment}.yaml")
    recipe_presets = _recipe_presets(files)
    config, earlier = OmegaConf.create({"experiment": experiment, "preset": preset}), []
    for name, content in files.items():
        config = _extend(config, name, content, earlier)
        earlier.insert(0, config)
    if OmegaConf.select(config, "data.name") is None:
        raise ConfigError(
            f"{CONFIGS / experiment}.yaml has no data: add bases: [base.yaml, data/cifar10.yaml]"
        )

    for key in overrides:
        _check_section(config, overrides, key)
    layers = _preset(experiment, preset, recipe_presets)
    name = (
        overrides.data.name
        if "name" in overrides.get("data", {})
        else _last(layers, "data.name", config.data.name)
    )
    if name != config.data.name:
        config.data = _data_section(name)
    OmegaConf.set_struct(config, True)
    for layer in layers:
        if "name" in layer.get("data", {}) and layer.data.name != name:
            del layer.data  # of the data set that the command line has replaced
        config = merge(config, layer, earlier)
    config = merge(config, overrides, earlier)
    _check_choices(config)
    return config


def presets(experiment: str) -> list[str]:
    """Names that `preset=` accepts for a recipe."""
    return list(_recipe_presets(_files(f"{experiment}.yaml")))


def describe(experiment: str, doc: str) -> str:
    """The text of --help: what is reproduced, the presets, every key with its default and comment."""
    comments = _comments(experiment)
    lines = [doc.strip(), "", f"presets: {', '.join(presets(experiment)) or 'none'}", ""]
    lines.append("keys, with the value of the recipe without a preset:")
    for key, value in _leaves(compose(experiment, [])):
        if key == "experiment":  # the script's name, not a key to give
            continue
        comment = f"  # {comments[key]}" if key in comments else ""
        lines.append(f"  {key}={'null' if value is None else value}{comment}")
    return "\n".join(lines)


def read(path: Path) -> DictConfig | ListConfig:
    """A YAML file. ConfigError: it is none."""
    try:
        return OmegaConf.load(path)
    except Exception as error:  # YAML's and OmegaConf's errors alike
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _files(name: str, extending: tuple[str, ...] = ()) -> dict[str, DictConfig]:
    """A file of configs/ and all that it extends, by name: each once, and behind its own bases.

    extending: the files that led here, each by its `bases`. ConfigError: one is missing, or extends itself.
    """
    if name in extending:
        raise ConfigError(f"{CONFIGS / name} extends itself: {' -> '.join((*extending, name))}")
    if not (CONFIGS / name).is_file():
        cause = (
            f"it is among the bases of {extending[-1]}"
            if extending
            else "a script needs a recipe of its name"
        )
        raise ConfigError(f"{CONFIGS / name} is missing: {cause}")
    content = read(CONFIGS / name)
    bases = content.get("bases", []) if isinstance(content, DictConfig) else None
    if not isinstance(bases, ListConfig | list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(
            f"{CONFIGS / name} needs its bases as a list of files: bases: [base.yaml, ...]"
        )
    files: dict[str, DictConfig] = {}
    for base in bases:
        files = files | _files(base, (*extending, name))
    return files | {name: content}


def _recipe_presets(files: dict[str, DictConfig]) -> DictConfig:
    """The `presets:` section of a recipe, over those of the recipes that it extends, preset by preset.

    ConfigError: it is no mapping, or one of its presets is none.
    """
    choices = sorted(path.stem for path in (CONFIGS / "presets").glob("*.yaml"))
    for name, content in files.items():
        section = content.get("presets")
        sections = list(section.values()) if isinstance(section, DictConfig) else []
        if section is not None and not (
            sections and all(isinstance(part, DictConfig) for part in sections)
        ):
            raise ConfigError(
                f"{CONFIGS / name}: presets are sections: presets: {{cpu: {{flow: ...}}, gpu: {{}}}}"
            )
        for preset in section or []:
            if preset not in choices:
                hint = nearest(str(preset), choices)
                raise ConfigError(
                    f"{CONFIGS / name}: presets.{preset} has no file presets/{preset}.yaml{hint}"
                )
    return OmegaConf.merge(*(content.get("presets") or {} for content in files.values()))


def _extend(
    config: DictConfig, name: str, content: DictConfig, earlier: list[DictConfig]
) -> DictConfig:
    """A file's content over what it extends. Keys may be new; those that there are keep their type, except `paper`.

    Another data.name brings the section of that data set. earlier: what was composed before, the newest first.
    """
    config = copy.deepcopy(config)
    data_name = OmegaConf.select(content, "data.name")
    if data_name not in (None, OmegaConf.select(config, "data.name")):
        config.data = _data_section(data_name)
    values = [dict(_leaves(layer)) for layer in (config, *earlier)]
    own = OmegaConf.masked_copy(
        content, [key for key in content if key not in ("bases", "presets")]
    )
    for key, value in _leaves(own, resolve=False):
        if key in DECIDED_ELSEWHERE:
            raise ConfigError(
                f"{CONFIGS / name}: {key} is not for a file to say: {DECIDED_ELSEWHERE[key]}"
            )
        if key.split(".")[0] == "paper":
            if problem := _wrong_paper(key, value):
                raise ConfigError(f"{CONFIGS / name}: {problem}")
        elif not _is_interpolation(value):  # it has a type when all is composed
            _check_extension(CONFIGS / name, key, value, values, is_recipe="bases" in content)
    return OmegaConf.merge(config, own)


DECIDED_ELSEWHERE = {
    "experiment": "it is the name of the recipe",
    "preset": "it is given on the command line",
}


def _is_interpolation(value) -> bool:
    return isinstance(value, str) and "${" in value


def _wrong_paper(key: str, value) -> str | None:
    """What is wrong with a value of `paper`, in words: it is null, a name, or a list of names."""
    names = value if isinstance(value, ListConfig) else [value]
    if key == "paper" and (value is None or all(isinstance(name, str) for name in names)):
        return None
    return f"{key}={value} has the wrong type: give a name, a list of names, or null"


def _check_extension(path: Path, key: str, value, values: list[dict], is_recipe: bool) -> None:
    """values: as in `_check_type`. is_recipe: the file has bases, and adds keys to sections in OPEN alone."""
    sections = [k for k in values[0] if k.startswith(f"{key}.")]
    parents = [
        k for k, replaced in values[0].items() if key.startswith(f"{k}.") and replaced is not None
    ]
    if sections:
        raise ConfigError(f"{path}: {key} is a section, not a value")
    if parents:
        raise ConfigError(f"{path}: {parents[0]} is a value, not a section with {key}")
    section = key.split(".")[0]
    names = {k.split(".")[0] for k in values[0]} - {"experiment", "preset"}
    is_new_section = section not in names and section != key
    near = difflib.get_close_matches(section, names, n=1, cutoff=0.75)
    is_typo = bool(near) if is_new_section else section not in OPEN and key not in values[0]
    if is_recipe and is_typo:
        raise ConfigError(
            f"{path}: {key} is no key of what it extends{nearest(key, list(values[0]))}"
        )
    if values[0].get(key) is not None and not _may_replace(value, key, values):
        raise ConfigError(f"{path}: {_wrong_type(key, value, values[0][key])}")


def _data_section(name: str) -> DictConfig:
    """The whole `data` section of a data set."""
    path = CONFIGS / "data" / f"{name}.yaml"
    known = sorted(p.stem for p in path.parent.glob("*.yaml"))
    if name not in known:
        raise ConfigError(
            f"data.name={name} is not known{nearest(str(name), known)}: give one of {', '.join(known)}"
        )
    return read(path).data


def _preset(experiment: str, preset: str | None, recipe_presets: DictConfig) -> list[DictConfig]:
    """The shared part of a preset (trainer, data, logger), then the recipe's own."""
    if preset is None:
        return []
    if preset not in recipe_presets:
        names = list(recipe_presets)
        choice = f"give one of {', '.join(names)}" if names else f"{experiment} has none"
        raise ConfigError(f"preset={preset} is not known{nearest(str(preset), names)}: {choice}")
    return [read(CONFIGS / "presets" / f"{preset}.yaml"), recipe_presets[preset]]


def parse(arguments: list[str]) -> DictConfig:
    """Words key=value as a config. ConfigError: not of that form, or no value that YAML can read."""
    for argument in arguments:
        if not re.match(r"[\w.]+=", argument):
            raise ConfigError(f"'{argument}' is not of the form key=value: see --help")
        if "${" in argument or argument.endswith("???"):
            raise ConfigError(
                f"'{argument}' holds ${{...}} or ???, a config's own syntax: give a plain value"
            )
    try:
        return OmegaConf.from_dotlist(arguments)
    except Exception as error:  # YAML and OmegaConf errors alike: the value cannot be read
        raise ConfigError(
            f"cannot read {' '.join(arguments)}: {str(error).splitlines()[0]}"
        ) from error


def _last(layers: list[DictConfig], key: str, otherwise):
    values = [value for layer in layers if (value := OmegaConf.select(layer, key)) is not None]
    return values[-1] if values else otherwise


def merge(config: DictConfig, layer: DictConfig, earlier: list[DictConfig]) -> DictConfig:
    """`layer` over `config`; a value has the type of what it replaces, in the config or in the recipe, or is null.

    earlier: the recipe, then what it extends; where one of them has null, null may come back.
    """
    values = [dict(_leaves(c)) for c in (config, *earlier)]
    for key, value in _leaves(layer):
        _check_type(values, key, value)
        if isinstance(OmegaConf.select(config, key), float) and type(value) is int:
            OmegaConf.update(layer, key, float(value))
    return OmegaConf.merge(config, layer)


def _check_section(config: DictConfig, overrides: DictConfig, key: str) -> None:
    if (
        key in config
        and isinstance(config[key], DictConfig)
        and not isinstance(overrides[key], DictConfig)
    ):
        raise ConfigError(
            f"{key} is a section, not a value: give {key}.KEY=..., with KEY one of {', '.join(config[key])}"
        )


def _check_type(values: list[dict], key: str, value) -> None:
    """values: the leaves of the config and of what it was composed from, the newest first."""
    keys = [k for k in values[0] if k != "experiment"]
    if key not in keys:
        inside = [k for k in keys if k.startswith(f"{key}.")]
        if inside:
            raise ConfigError(f"{key} is a section, not a value: give one of {', '.join(inside)}")
        raise ConfigError(f"{key} is no key of this recipe{nearest(key, keys)}: see --help")
    if key == "paper":
        if problem := _wrong_paper(key, value):
            raise ConfigError(problem)
        return
    if key not in CHOICES and not _may_replace(value, key, values):
        raise ConfigError(_wrong_type(key, value, values[0][key]))


def _may_replace(value, key: str, values: list[dict]) -> bool:
    """Whether `value` fits what it replaces in the newest of `values` or the one before, or is null as in any."""
    replaced = [leaves[key] for leaves in values if key in leaves]
    return any(_fits(value, old) for old in replaced[:2]) or (value is None and None in replaced)


def _wrong_type(key: str, value, replaced) -> str:
    kind = "list like it" if isinstance(replaced, ListConfig) else type(replaced).__name__
    text = "null" if value is None else value
    return f"{key}={text} has the wrong type: it replaces {replaced!r}, so give a {kind}"


def _fits(value, old) -> bool:
    """Whether `value` may stand where `old` does: null is free, `auto` any scalar, an int may become a float."""
    if isinstance(value, ListConfig) and isinstance(old, ListConfig):
        return not old or all(_fits(element, old[0]) for element in value)
    if type(old) is type(value):
        return True
    if old is None:
        return not isinstance(value, ListConfig)
    if value is None:
        return False
    return (old == "auto" and not isinstance(value, ListConfig)) or (
        isinstance(old, float) and type(value) is int
    )


def _check_choices(config: DictConfig) -> None:
    for key, choices in CHOICES.items():
        value = OmegaConf.select(config, key)
        if value not in choices:
            names = [str(c) for c in choices if c is not None]
            raise ConfigError(
                f"{key}={value} is not known{nearest(str(value), names)}: give one of {', '.join(names)}"
            )


def nearest(word: str, known: list[str]) -> str:
    """', did you mean X?' for the nearest name, whatever its case; whole keys first, then last parts."""
    by_lower = {k.lower(): k for k in known} | {
        k.lower().split(".")[-1]: k for k in reversed(known)
    }
    matches = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    matches = matches or difflib.get_close_matches(
        word.lower().split(".")[-1], by_lower, n=1, cutoff=0.6
    )
    return f" (did you mean {by_lower[matches[0]]}?)" if matches else ""


def _leaves(config: DictConfig, prefix: str = "", resolve: bool = True) -> list[tuple[str, object]]:
    """Dotted keys and values. resolve: whether ${...} is looked up, for which the config has to be whole."""
    leaves: list[tuple[str, object]] = []
    for key in config:
        if not resolve and OmegaConf.is_interpolation(config, key):
            leaves.append((f"{prefix}{key}", OmegaConf.to_container(config, resolve=False)[key]))
            continue
        value = config[key]
        if isinstance(value, DictConfig):
            leaves += _leaves(value, f"{prefix}{key}.", resolve)
        else:
            leaves.append((f"{prefix}{key}", value))
    return leaves


def _comments(experiment: str) -> dict[str, str]:
    """Dotted key -> the comment that --help shows.

    A file without bases (base.yaml, data/*.yaml) says what a key is; a recipe says where its value comes from, which
    no longer holds where a recipe that extends it gives another.
    """
    of_keys: dict[str, str] = {}
    of_values: dict[str, str] = {}
    for name in _files(f"{experiment}.yaml"):
        text = (CONFIGS / name).read_text(encoding="utf-8")
        comments = _comments_of(text)
        written = {key: comment for key, comment in comments.items() if comment}
        if re.search(r"^bases:", text, re.MULTILINE):
            of_values = {
                key: comment for key, comment in of_values.items() if key not in comments
            } | written
        else:
            of_keys |= written
    return of_keys | of_values


def _comments_of(text: str) -> dict[str, str | None]:
    """Dotted key -> the comment at the end of its line, or None."""
    comments, stack = {}, []
    for line in text.splitlines():
        match = re.match(r"( *)(\w+):[^#]*(?:# (.*))?$", line)
        if match:
            indent, key = len(match[1]) // 2, match[2]
            stack = [*stack[:indent], key]
            comments[".".join(stack)] = match[3]
    return comments


def arguments(argv: list[str] | None) -> list[str]:
    """The command line's arguments, or those given in its place."""
    return list(sys.argv[1:] if argv is None else argv)
