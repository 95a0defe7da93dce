"""Recipes: compose their YAML files, apply the command line, and check every value.

Which values a key takes is decided in `reproduce.schema`. This module knows no model.
"""

import difflib
import functools
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reproduce.kinds import (
    UNKNOWN,
    Kind,
    WrongValue,
    argument_text,
    as_text,
    choices,
    kind_of_value,
    unquoted,
)
from reproduce.schema import ALIASES, Schema

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
KEY = re.compile(r"\w+(\.\w+)*")
LONGEST_SHOWN = 60  # characters of a wrong value in a message
# Sections to which a recipe may add keys: the arguments of its own flow, data and objective.
OPEN_SECTIONS = ("flow", "data", "optim", "eval")
DECIDED_ELSEWHERE = {
    "experiment": "it is the name of the recipe",
    "preset": "it is given on the command line",
}
Values = dict[str, Any]  # dotted key -> value


class ConfigError(Exception):
    """A user's mistake; its message is one line that says what to do."""


def compose(experiment: str, arguments: list[str]) -> DictConfig:
    """Compose the config of an experiment. Later layers replace values of earlier ones.

    The layers are: the bases of the recipe, the recipe, the data set's section, the preset, the
    key=value arguments. data.name and preset are looked up first in all of them, since they bring
    sections of their own. After the recipe no layer may add a key. A value is read as its key
    demands (`Schema`).
    """
    overrides = parse(arguments)
    preset: str | None = overrides.pop("preset", "")
    if preset in ("", "null"):
        preset = None
    schema = Schema(experiment)
    files = _files(f"{experiment}.yaml")
    recipe_presets = _recipe_presets(files)
    values: Values = {"experiment": experiment, "preset": preset}
    for name, content in files.items():
        values = _extend(values, name, content, schema)
    if values.get("data.name") is None:
        raise ConfigError(
            f"{CONFIGS / experiment}.yaml has no data: add bases: [base.yaml, data/cifar10.yaml]"
        )

    _check_sections(values, overrides)
    layers = _preset(experiment, preset, recipe_presets)
    names = [layer.get("data.name") for layer in (values, *layers, overrides)]
    data_name = [name for name in names if name is not None][-1]
    if data_name != values["data.name"]:
        values = _with_data(values, data_name, schema)
    for layer in layers:
        if layer.get("data.name") not in (None, data_name):  # the command line has replaced it
            layer = {key: text for key, text in layer.items() if not key.startswith("data.")}
        _update(values, layer, schema, f"preset={preset}: ")
    _update(values, overrides, schema)
    try:
        config = OmegaConf.create(_nested(values))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{CONFIGS / experiment}.yaml has a wrong ${{...}}: {reason}") from error
    _check_interpolations(config, values, schema)
    OmegaConf.set_struct(config, True)
    return config


def presets(experiment: str) -> list[str]:
    """The names that `preset=` accepts for a recipe."""
    return list(_recipe_presets(_files(f"{experiment}.yaml")))


def describe(experiment: str, doc: str, words: Iterable[str] = ()) -> str:
    """The text of --help: what is reproduced, the presets, each key with its value and comment.

    words: the other words of the command line, of which preset= and data.name= count.
    ConfigError: the recipe has no such preset, or there are no such data.
    """
    chosen = [word for word in words if word.startswith(("preset=", "data.name="))]
    names = presets(experiment)
    lines = [doc.strip(), "", f"presets: {', '.join(names) or 'none'}"]
    offline = " and ".join(sorted(_presets_without_wandb(experiment)))
    if offline:
        lines.append(f"{offline} switch W&B off: add logger.name=wandb to log there")
    lines += ["", f"keys, with the value of {' '.join(chosen) or 'the recipe without a preset'}:"]
    recipe = dict(_leaves(compose(experiment, [])))
    config = compose(experiment, chosen)
    of_keys, of_values = _comments(experiment)
    if config.data.name != recipe["data.name"]:
        # The comments of the recipe's own data do not describe others.
        of_keys = _without_data(of_keys) | _comments_of_data(config.data.name)
        of_values = _without_data(of_values)
    for key, value in _leaves(config):
        if key == "experiment":  # the script's name, which cannot be given
            continue
        comment = of_keys.get(key)
        if recipe.get(key) == value:
            comment = of_values.get(key, comment)
        line = f"  {key}={argument_text(value)}"
        if comment is not None:
            line += f"  # {comment}"
        lines.append(line)
    return "\n".join(lines)


def _presets_without_wandb(experiment: str) -> list[str]:
    """The presets that replace the recipe's logger W&B by another one."""
    names = []
    if OmegaConf.select(compose(experiment, []), "logger.name") == "wandb":
        for name in presets(experiment):
            if compose(experiment, [f"preset={name}"]).logger.name != "wandb":
                names.append(name)
    return names


class _TextLoader(yaml.BaseLoader):
    """A YAML loader that leaves every value a text, to be read as its key demands."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [part.value for part, _ in node.value]
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        if repeated:
            raise ValueError(f"{', '.join(repeated)} is given twice: give it once")
        return super().construct_mapping(node, deep)


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> object:
    return yaml.load(text, _TextLoader)


def read(path: Path) -> object:
    """The content of a YAML file, with all values as texts. ConfigError: it cannot be read."""
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except Exception as error:  # the YAML reader raises errors of many classes
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _section(path: Path) -> dict[str, Any]:
    """The sections of a YAML file; empty if it holds none."""
    content = read(path)
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no sections: give trainer: {{...}}, data: {{...}}")
    return content


def _files(name: str, extending: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """The contents of a file of configs/ and of all files that it extends, by name.

    Every file comes once, after its bases. extending: the files whose `bases` have led here.

    ConfigError: a file is missing or extends itself, or its `bases` are not a list of files.
    """
    path = CONFIGS / name
    if name in extending:
        raise ConfigError(f"{path} extends itself: {' -> '.join((*extending, name))}")
    if not path.is_file():
        cause = "a script needs a recipe of its name"
        if extending:
            cause = f"it is among the bases of {extending[-1]}"
        raise ConfigError(f"{path} is missing: {cause}")
    content = read(path)
    bases: object = None
    if isinstance(content, dict):
        bases = content.get("bases", [])
    is_list = isinstance(bases, list) and all(str(base).endswith(".yaml") for base in bases)
    if not isinstance(content, dict) or not isinstance(bases, list) or not is_list:
        raise ConfigError(f"{path} needs its bases as a list of files: bases: [base.yaml, ...]")
    files: dict[str, dict[str, Any]] = {}
    for base in bases:
        files = files | _files(base, (*extending, name))
    return files | {name: content}


def _recipe_presets(files: dict[str, dict[str, Any]]) -> dict[str, dict[str, object]]:
    """The section `presets` of a recipe, over those of the recipes that it extends.

    Returns preset -> dotted key -> text. ConfigError: the section or one of its presets is not a
    mapping, or a preset has no file in configs/presets/.
    """
    choices = sorted(path.stem for path in (CONFIGS / "presets").glob("*.yaml"))
    presets: dict[str, dict[str, object]] = {}
    for name, content in files.items():
        section = content.get("presets")
        if section is None:
            continue
        if not _holds_sections(section):
            example = "presets: {cpu: {flow: ...}, gpu: {}}"
            raise ConfigError(f"{CONFIGS / name}: presets are sections: {example}")
        for preset, part in section.items():
            if preset not in choices:
                hint = nearest(preset, choices)
                raise ConfigError(
                    f"{CONFIGS / name}: presets.{preset} has no file presets/{preset}.yaml{hint}"
                )
            presets[preset] = presets.get(preset, {}) | _texts(part)
    return presets


def _holds_sections(section: object) -> bool:
    if not isinstance(section, dict) or not section:
        return False
    return all(isinstance(part, dict) for part in section.values())


def _extend(values: Values, name: str, content: dict[str, Any], schema: Schema) -> Values:
    """The values of a file's bases, replaced by the file's own; the file may add keys.

    Another data.name replaces the whole section `data` by that of the data set.
    """
    values = dict(values)
    own = {
        key: text
        for key, text in _texts(content).items()
        if key.partition(".")[0] not in ("bases", "presets")
    }
    data_name = own.get("data.name")
    if data_name is not None and data_name != values.get("data.name"):
        values = _with_data(values, argument_text(data_name), schema)
    known = [key for key, value in values.items() if value != {}]
    for key, text in own.items():
        if text == {} and key not in known:  # an empty section
            values.setdefault(key, {})
            continue
        _check_key(CONFIGS / name, key, known, is_recipe="bases" in content)
        if _is_interpolation(text):  # it is read when all files are composed
            values[key] = text
        else:
            _set(values, key, text, schema, f"{CONFIGS / name}: ")
    return values


def _is_interpolation(text: object) -> bool:
    return isinstance(text, str) and "${" in text


def _check_key(path: Path, key: str, known: list[str], is_recipe: bool) -> None:
    """ConfigError: a file may not set this key.

    known: the keys of the files that it extends. is_recipe: the file has bases, so it may add keys
    to the sections in OPEN_SECTIONS only.
    """
    if key in DECIDED_ELSEWHERE:
        raise ConfigError(f"{path}: {key} cannot be set in a file: {DECIDED_ELSEWHERE[key]}")
    if KEY.fullmatch(key) is None:  # also YAML's merge key <<, which is not supported
        raise ConfigError(f"{path}: {key} is not a key: keys are letters, digits and _")
    if any(k.startswith(f"{key}.") for k in known):
        raise ConfigError(f"{path}: {key} is a section, not a value")
    parents = [k for k in known if key.startswith(f"{k}.")]
    if parents:
        raise ConfigError(f"{path}: {parents[0]} is a value, not a section with {key}")
    if is_recipe and _is_typo(key, known):
        hint = nearest(key, known)
        raise ConfigError(f"{path}: {key} is no key of its bases{hint}")


def _is_typo(key: str, known: list[str]) -> bool:
    """Whether a recipe's new key is taken for a misspelt one.

    It is if recipes may not add keys to its section, or if its section is new and has almost the
    name of another one.
    """
    section = key.split(".")[0]
    names = {k.split(".")[0] for k in known} - set(DECIDED_ELSEWHERE)
    if section not in names and section != key:
        return bool(difflib.get_close_matches(section, names, n=1, cutoff=0.75))
    return section not in OPEN_SECTIONS and key not in known


def _with_data(values: Values, name: str, schema: Schema) -> Values:
    """The values with their section `data` replaced by that of another data set."""
    path = CONFIGS / "data" / f"{name}.yaml"
    known = sorted(p.stem for p in path.parent.glob("*.yaml"))
    if name not in known:
        hint = nearest(str(name), known)
        raise ConfigError(f"data.name={name} is not known{hint}: give one of {', '.join(known)}")
    schema.use_data(name)
    section: Values = {}
    for key, text in _texts(_section(path)).items():
        _set(section, key, text, schema, f"{path}: ")
    replaced: Values = {}
    for key, value in values.items():
        if key.startswith("data."):
            replaced |= section
        else:
            replaced[key] = value
    return replaced | section


def _preset(
    experiment: str, preset: str | None, recipe_presets: dict[str, dict[str, object]]
) -> list[dict[str, object]]:
    """The two layers of a preset, as key -> text: the shared file, then the recipe's own part."""
    if preset is None:
        return []
    if preset not in recipe_presets:
        names = list(recipe_presets)
        choice = f"{experiment} has none"
        if names:
            choice = f"give one of {', '.join(names)}"
        raise ConfigError(f"preset={preset} is not known{nearest(preset, names)}: {choice}")
    shared = _section(CONFIGS / "presets" / f"{preset}.yaml")
    return [_texts(shared), recipe_presets[preset]]


def parse(arguments: list[str]) -> dict[str, str]:
    """Read key=value arguments as key -> text.

    ConfigError: an argument has another form, or a key comes twice.
    """
    texts: dict[str, str] = {}
    for argument in arguments:
        if not _is_setting(argument):
            hint = ""
            bare = argument.lstrip("-+")
            if _is_setting(bare):  # with the dashes of other programs
                hint = f" (did you mean {bare}?)"
            raise ConfigError(f"'{argument}' is not of the form key=value{hint}: see --help")
        if "${" in argument or argument.endswith("???"):
            raise ConfigError(
                f"'{argument}' holds ${{...}} or ???, a config's own syntax: give a plain value"
            )
        key, _, raw = argument.partition("=")
        text = unquoted(raw)
        if key in texts:
            raise ConfigError(f"{key} is given twice, as {texts[key]} and as {text}: give it once")
        texts[key] = text
    return texts


def _is_setting(argument: str) -> bool:
    key, separator, _ = argument.partition("=")
    return bool(separator) and KEY.fullmatch(key) is not None


def override(words: Iterable[str], changes: Iterable[str]) -> list[str]:
    """key=value words, with those of `changes` in the place of words with the same key.

    With it a command lets a user's arguments replace its own settings.
    """
    changes = list(changes)
    keys = {word.partition("=")[0] for word in changes}
    return [*(word for word in words if word.partition("=")[0] not in keys), *changes]


def merge(
    config: DictConfig, texts: Mapping[str, object], schema: Schema | None = None
) -> DictConfig:
    """A config with some values replaced: key -> text, each text read as its key demands.

    schema: the kinds of the keys; None: each key keeps the kind of its value in `config`.
    """
    values = dict(_leaves(config))
    _update(values, texts, schema)
    return OmegaConf.create(_nested(values))


def _update(
    values: Values, texts: Mapping[str, object], schema: Schema | None, source: str = ""
) -> None:
    """Replace values, in place, by texts read as their keys demand. ConfigError: an unknown key.

    source: the file of the texts, with which an error message begins.
    """
    known = list(values)
    for key, text in texts.items():
        if text == {} and key not in known:  # an empty section
            continue
        _check_known(key, known, source)
        _set(values, key, text, schema, source)


def _set(values: Values, key: str, text: object, schema: Schema | None, source: str = "") -> None:
    """Set the value of a key, in place, to a text read as the key demands.

    source: the file of the text, with which an error message begins. ConfigError: the key does not
    take this value.
    """
    before = values.get(key)
    kind = kind_of_value(before) if schema is None else schema.kind(key)
    try:
        values[key] = kind.read(text)
    except WrongValue as error:
        example = kind.example
        if before not in (None, "") and not _is_interpolation(before):
            example = argument_text(before)
        message = f"{source}{key}={_quoted(text)} {_advice(key, text, kind, str(error), example)}"
        raise ConfigError(" ".join(message.split())) from error
    if schema is not None:
        schema.learn(key, values[key])


def _advice(key: str, text: object, kind: Kind, problem: str, example: str) -> str:
    """What is wrong with the text of a value, and what to give in its place."""
    if problem == UNKNOWN:
        problem += nearest(argument_text(text), choices(kind))
    advice = f"{problem}: give {kind.name}"
    if f" {example}" not in advice:
        advice += f", for example {key}={example}"
    return advice


def _quoted(text: object) -> str:
    """A value as a message quotes it, cut off if it is long."""
    shown = argument_text(text)
    if len(shown) > LONGEST_SHOWN:
        return f"{shown[:LONGEST_SHOWN]}..."
    return shown


def _check_sections(values: Values, overrides: Mapping[str, object]) -> None:
    """ConfigError: a value is given for a whole section."""
    for key in overrides:
        inside = [k.removeprefix(f"{key}.") for k in values if k.startswith(f"{key}.")]
        if inside or values.get(key) == {}:
            raise ConfigError(
                f"{key} is a section, not a value: give {key}.KEY=..., "
                f"with KEY one of {', '.join(inside)}"
            )


def _check_known(key: str, known: list[str], source: str) -> None:
    """ConfigError: a config has no such key."""
    keys = [k for k in known if k != "experiment"]
    if key in keys:
        return
    inside = [k for k in keys if k.startswith(f"{key}.")]
    if inside:
        raise ConfigError(
            f"{source}{key} is a section, not a value: give one of {', '.join(inside)}"
        )
    raise ConfigError(f"{source}{key} is not a known key{nearest(key, keys)}: see --help")


def _check_interpolations(config: DictConfig, values: Values, schema: Schema) -> None:
    """Check the values that a file gives as ${another.key}, now that every key has a value."""
    for key, text in values.items():
        if not _is_interpolation(text):
            continue
        try:
            value = OmegaConf.select(config, key)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{key}={text} of the recipe has no value: {reason}") from error
        _set(dict(values), key, as_text(value), schema)


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` with the name X that is most like a word; empty if no name is like it.

    Upper and lower case count as the same. Whole keys are compared first, then their last parts. A
    setting's name in Lightning and other programs leads to the key here (`ALIASES`).
    """
    names = list(known)
    last = word.lower().split(".")[-1]
    if ALIASES.get(last) in names:
        return f" (did you mean {ALIASES[last]}?)"
    by_lower = {name.lower(): name for name in names}
    by_lower |= {name.lower().split(".")[-1]: name for name in reversed(names)}
    matches = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    matches = matches or difflib.get_close_matches(last, by_lower, n=1, cutoff=0.6)
    if not matches:
        return ""
    return f" (did you mean {by_lower[matches[0]]}?)"


def _texts(content: dict[str, Any], prefix: str = "") -> dict[str, object]:
    """The content of a file as dotted key -> text or list of texts; an empty section is {}."""
    texts: dict[str, object] = {}
    for key, part in content.items():
        if isinstance(part, dict) and part:
            texts |= _texts(part, f"{prefix}{key}.")
        else:
            texts[f"{prefix}{key}"] = part
    return texts


def _nested(values: Values) -> dict[str, Any]:
    """Dotted key -> value as nested dicts, one for each section."""
    root: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        part = root
        for section in sections:
            part = part.setdefault(section, {})
        if value != {} or name not in part:
            part[name] = value
    return root


def _leaves(config: DictConfig, prefix: str = "") -> list[tuple[str, Any]]:
    """The values of a config with their dotted keys."""
    leaves: list[tuple[str, Any]] = []
    for name, value in config.items():
        key = f"{prefix}{name!s}"
        if isinstance(value, DictConfig):
            leaves += _leaves(value, f"{key}.")
        else:
            leaves.append((key, value))
    return leaves


def plain(config: DictConfig, resolve: bool = True) -> dict[str, Any]:
    """A config as nested dicts. resolve: whether ${another.key} is replaced by its value."""
    return cast("dict[str, Any]", OmegaConf.to_container(config, resolve=resolve))


def _comments(experiment: str) -> tuple[dict[str, str], dict[str, str]]:
    """Dotted key -> the comment that --help shows, as two dicts.

    The first has the comments of base.yaml and data/*.yaml, which explain keys. The second has
    those of recipes, which name the source of a value, so they are dropped where a recipe that
    extends it gives another value.
    """
    of_keys: dict[str, str] = {}
    of_values: dict[str, str] = {}
    for name in _files(f"{experiment}.yaml"):
        text = (CONFIGS / name).read_text(encoding="utf-8")
        comments = _comments_of(text)
        written = {key: comment for key, comment in comments.items() if comment}
        if re.search(r"^bases:", text, re.MULTILINE):
            older = {key: comment for key, comment in of_values.items() if key not in comments}
            of_values = older | written
        else:
            of_keys |= written
    return of_keys, of_values


def _comments_of_data(name: str) -> dict[str, str]:
    """Dotted key -> the comment of a key in data/<name>.yaml."""
    comments = _comments_of((CONFIGS / "data" / f"{name}.yaml").read_text(encoding="utf-8"))
    return {key: comment for key, comment in comments.items() if comment}


def _without_data(comments: dict[str, str]) -> dict[str, str]:
    return {key: comment for key, comment in comments.items() if not key.startswith("data.")}


def _comments_of(text: str) -> dict[str, str | None]:
    """Dotted key -> the comment at the end of its line, or None."""
    comments: dict[str, str | None] = {}
    sections: list[str] = []
    for line in text.splitlines():
        match = re.match(r"( *)(\w+):[^#]*(?:# (.*))?$", line)
        if match:
            depth = len(match[1]) // 2
            sections = [*sections[:depth], match[2]]
            comments[".".join(sections)] = match[3]
    return comments


def arguments(argv: list[str] | None) -> list[str]:
    """The command line's arguments, or those given in its place."""
    return list(sys.argv[1:] if argv is None else argv)
