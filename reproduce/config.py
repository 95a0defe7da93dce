"""Recipes: OmegaConf files composed, overridden from the command line, and checked. Nothing here knows a model."""

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
NONE_ONE_OR_SEVERAL = ("paper",)  # keys whose value is null, a name, or a list of names


class ConfigError(Exception):
    """A mistake of the user's: one line that says what to do."""


def compose(experiment: str, arguments: list[str]) -> DictConfig:
    """The recipe `experiment` with its bases, data set and preset, and `key=value` arguments on top.

    data.name and preset are read first, since they bring sections of their own; from then on no key may be new and
    no value may change its type.
    """
    recipe = _read(CONFIGS / f"{experiment}.yaml")
    overrides = parse(arguments)
    preset = OmegaConf.select(overrides, "preset")
    config = OmegaConf.create({"experiment": experiment, "preset": preset})
    for base in recipe.pop("bases"):
        config = OmegaConf.merge(config, _read(CONFIGS / base))
    base, own = config, recipe.pop("presets", OmegaConf.create({}))
    config = OmegaConf.merge(config, recipe)

    for key in overrides:
        _check_section(config, overrides, key)
    layers = _preset(experiment, preset, own)
    name = overrides.data.name if "name" in overrides.get("data", {}) else _last(layers, "data.name", config.data.name)
    if name != config.data.name:
        config.data = _read(_data_file(name)).data
    OmegaConf.set_struct(config, True)
    before = [config, base]
    for layer in layers:
        if "name" in layer.get("data", {}) and layer.data.name != name:
            del layer.data  # of the data set that the command line has replaced
        config = merge(config, layer, before)
    config = merge(config, overrides, before)
    _check_choices(config)
    return config


def presets(experiment: str) -> list[str]:
    """Names that `preset=` accepts for a recipe."""
    return list(_read(CONFIGS / f"{experiment}.yaml").get("presets", {}))


def describe(experiment: str, doc: str) -> str:
    """The text of --help: what is reproduced, the presets, every key with its default and comment."""
    recipe = _read(CONFIGS / f"{experiment}.yaml")
    comments: dict[str, str] = {}
    for file in [*recipe.bases, f"{experiment}.yaml"]:
        comments |= _comments((CONFIGS / file).read_text())
    lines = [doc.strip(), "", f"presets: {', '.join(presets(experiment)) or 'none'}", ""]
    lines.append("keys, with the value of the recipe without a preset:")
    for key, value in _leaves(compose(experiment, [])):
        if key == "experiment":  # the script's name, not a key to give
            continue
        comment = f"  # {comments[key]}" if key in comments else ""
        lines.append(f"  {key}={'null' if value is None else value}{comment}")
    return "\n".join(lines)


def _read(path: Path) -> DictConfig:
    return OmegaConf.load(path)


def _data_file(name: str) -> Path:
    path = CONFIGS / "data" / f"{name}.yaml"
    known = sorted(p.stem for p in path.parent.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"data.name={name} is not known{nearest(str(name), known)}: give one of {', '.join(known)}")
    return path


def _preset(experiment: str, preset: str | None, own: DictConfig) -> list[DictConfig]:
    """The shared part of a preset (trainer, data, logger), then the recipe's own."""
    if preset is None:
        return []
    if preset not in own:
        known = f"give one of {', '.join(own)}" if own else f"{experiment} has none"
        raise ConfigError(f"preset={preset} is not known{nearest(str(preset), list(own))}: {known}")
    return [_read(CONFIGS / "presets" / f"{preset}.yaml"), own[preset]]


def parse(arguments: list[str]) -> DictConfig:
    """Words key=value as a config. ConfigError: not of that form, or no value that YAML can read."""
    for argument in arguments:
        if not re.match(r"[\w.]+=", argument):
            raise ConfigError(f"'{argument}' is not of the form key=value: see --help")
        if "${" in argument or argument.endswith("???"):
            raise ConfigError(f"'{argument}' holds ${{...}} or ???, a config's own syntax: give a plain value")
    try:
        return OmegaConf.from_dotlist(arguments)
    except Exception as error:  # YAML and OmegaConf errors alike: the value cannot be read
        raise ConfigError(f"cannot read {' '.join(arguments)}: {str(error).splitlines()[0]}") from error


def _last(layers: list[DictConfig], key: str, otherwise):
    values = [value for layer in layers if (value := OmegaConf.select(layer, key)) is not None]
    return values[-1] if values else otherwise


def merge(config: DictConfig, layer: DictConfig, before: list[DictConfig]) -> DictConfig:
    """`layer` over `config`; a value has the type of what it replaces, there or in the recipe or base it came from."""
    there = [dict(_leaves(c)) for c in (config, *before)]
    for key, value in _leaves(layer):
        _check_type(there, key, value)
        if isinstance(OmegaConf.select(config, key), float) and type(value) is int:
            OmegaConf.update(layer, key, float(value))
    return OmegaConf.merge(config, layer)


def _check_section(config: DictConfig, overrides: DictConfig, key: str) -> None:
    if key in config and isinstance(config[key], DictConfig) and not isinstance(overrides[key], DictConfig):
        raise ConfigError(
            f"{key} is a section, not a value: give {key}.KEY=..., with KEY one of {', '.join(config[key])}"
        )


def _check_type(there: list[dict], key: str, value) -> None:
    """there: the leaves of the config and of what it was composed from."""
    keys = [k for k in there[0] if k != "experiment"]
    if key not in keys:
        inside = [k for k in keys if k.startswith(f"{key}.")]
        if inside:
            raise ConfigError(f"{key} is a section, not a value: give one of {', '.join(inside)}")
        raise ConfigError(f"{key} is no key of this recipe{nearest(key, keys)}: see --help")
    if key in NONE_ONE_OR_SEVERAL:
        names = value if isinstance(value, ListConfig) else [value]
        if value is not None and not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{key}={value} has the wrong type: give a name, a list of names, or null")
        return
    replaced = [leaves[key] for leaves in there if key in leaves]
    fits = any(_fits(value, old) for old in replaced[:2]) or (value is None and None in replaced)
    if not fits and key not in CHOICES:
        kind = "list like it" if isinstance(replaced[0], ListConfig) else type(replaced[0]).__name__
        raise ConfigError(f"{key}={value} has the wrong type: it replaces {replaced[0]!r}, so give a {kind}")


def _fits(value, old) -> bool:
    """Whether `value` may stand where `old` does: null is free, `auto` any scalar, an int may become a float."""
    if isinstance(value, ListConfig) and isinstance(old, ListConfig):
        return all(_fits(element, old[0]) for element in value)
    if type(old) is type(value):
        return True
    if old is None:
        return not isinstance(value, ListConfig)
    if value is None:
        return False
    return (old == "auto" and not isinstance(value, ListConfig)) or (isinstance(old, float) and type(value) is int)


def _check_choices(config: DictConfig) -> None:
    for key, choices in CHOICES.items():
        value = OmegaConf.select(config, key)
        if value not in choices:
            names = [str(c) for c in choices if c is not None]
            raise ConfigError(f"{key}={value} is not known{nearest(str(value), names)}: give one of {', '.join(names)}")


def nearest(word: str, known: list[str]) -> str:
    """', did you mean X?' for the nearest name, whatever its case; whole keys first, then last parts."""
    by_lower = {k.lower(): k for k in known} | {k.lower().split(".")[-1]: k for k in reversed(known)}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    found = found or difflib.get_close_matches(word.lower().split(".")[-1], by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[found[0]]}?)" if found else ""


def _leaves(config: DictConfig, prefix: str = "") -> list[tuple[str, object]]:
    leaves = []
    for key in config:
        value = config[key]
        if isinstance(value, DictConfig):
            leaves += _leaves(value, f"{prefix}{key}.")
        else:
            leaves.append((f"{prefix}{key}", value))
    return leaves


def _comments(text: str) -> dict[str, str]:
    """Dotted key -> the comment at the end of its line."""
    found, stack = {}, []
    for line in text.splitlines():
        match = re.match(r"( *)(\w+):[^#]*(?:# (.*))?$", line)
        if match:
            indent, key, comment = len(match[1]) // 2, match[2], match[3]
            stack = [*stack[:indent], key]
            if comment:
                found[".".join(stack)] = comment
    return found


def arguments(argv: list[str] | None) -> list[str]:
    """The command line's arguments, or those given in its place."""
    return list(sys.argv[1:] if argv is None else argv)
