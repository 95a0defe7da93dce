"""Recipes: YAML files composed, overridden from the command line, and checked.

`reproduce.schema` says what a value may be. Nothing here knows a model.
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
    as_text,
    choices,
    kind_of_value,
    one_text,
    unquoted,
)
from reproduce.schema import ALIASES, Schema

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
KEY = re.compile(r"\w+(\.\w+)*")
LONGEST_SHOWN = 60  # characters of a wrong value in a message
# Sections to which a recipe may add keys: they are arguments of what it chooses.
OPEN = ("flow", "data", "optim")
DECIDED_ELSEWHERE = {
    "experiment": "it is the name of the recipe",
    "preset": "it is given on the command line",
}
Values = dict[str, Any]  # dotted key -> value


class ConfigError(Exception):
    """A mistake of the user's: one line that says what to do."""


def compose(experiment: str, arguments: list[str]) -> DictConfig:
    """The recipe `experiment` over its bases, then its data set, preset and key=value arguments.

    data.name and preset are read first, since they bring sections of their own; from then on no key
    may be new. What a value may be is decided by its key (`Schema`).
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
    """Names that `preset=` accepts for a recipe."""
    return list(_recipe_presets(_files(f"{experiment}.yaml")))


def describe(experiment: str, doc: str) -> str:
    """The text of --help: what is reproduced, the presets, each key with default and comment."""
    comments = _comments(experiment)
    lines = [doc.strip(), "", f"presets: {', '.join(presets(experiment)) or 'none'}", ""]
    lines.append("keys, with the value of the recipe without a preset:")
    for key, value in _leaves(compose(experiment, [])):
        if key == "experiment":  # the script's name, not a key to give
            continue
        line = f"  {key}={one_text(value)}"
        if key in comments:
            line += f"  # {comments[key]}"
        lines.append(line)
    return "\n".join(lines)


class _Texts(yaml.BaseLoader):
    """YAML whose values all stay texts: what they mean is decided by their keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [part.value for part, _ in node.value]
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        if repeated:
            raise ValueError(f"{', '.join(repeated)} is given twice: give it once")
        return super().construct_mapping(node, deep)


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> object:
    return yaml.load(text, _Texts)


def read(path: Path) -> object:
    """A YAML file: dicts and lists whose values are all texts. ConfigError: it is none."""
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except Exception as error:  # whatever YAML finds: it raises many kinds
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _section(path: Path) -> dict[str, Any]:
    """The content of a file that holds sections; an empty file holds none."""
    content = read(path)
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no sections: give trainer: {{...}}, data: {{...}}")
    return content


def _files(name: str, extending: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """A file of configs/ and all that it extends, by name: each once, and behind its own bases.

    extending: the files that led here, each by its `bases`. ConfigError: one is missing, or extends
    itself.
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
    """Preset -> key -> text: the `presets:` of a recipe over those of the recipes that it extends.

    ConfigError: it is no mapping, or one of its presets is none.
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
    """A file's content over what it extends.

    Keys may be new. Another data.name brings the whole section of that data set.
    """
    values = dict(values)
    own = {
        key: text
        for key, text in _texts(content).items()
        if key.partition(".")[0] not in ("bases", "presets")
    }
    data_name = own.get("data.name")
    if data_name is not None and data_name != values.get("data.name"):
        values = _with_data(values, one_text(data_name), schema)
    known = [key for key, value in values.items() if value != {}]
    for key, text in own.items():
        if text == {} and key not in known:  # a section in which nothing changes
            values.setdefault(key, {})
            continue
        _check_key(CONFIGS / name, key, known, is_recipe="bases" in content)
        if _is_interpolation(text):  # it has a value when all is composed
            values[key] = text
        else:
            _set(values, key, text, schema, f"{CONFIGS / name}: ")
    return values


def _is_interpolation(text: object) -> bool:
    return isinstance(text, str) and "${" in text


def _check_key(path: Path, key: str, known: list[str], is_recipe: bool) -> None:
    """ConfigError: a file may not give this key.

    known: the keys of what it extends. is_recipe: the file has bases, and adds keys to sections in
    OPEN alone.
    """
    if key in DECIDED_ELSEWHERE:
        raise ConfigError(f"{path}: {key} is not for a file to say: {DECIDED_ELSEWHERE[key]}")
    if KEY.fullmatch(key) is None:  # YAML's << among others, which is not followed
        raise ConfigError(f"{path}: {key} is no key: keys are letters, digits and _")
    if any(k.startswith(f"{key}.") for k in known):
        raise ConfigError(f"{path}: {key} is a section, not a value")
    parents = [k for k in known if key.startswith(f"{k}.")]
    if parents:
        raise ConfigError(f"{path}: {parents[0]} is a value, not a section with {key}")
    if is_recipe and _is_typo(key, known):
        hint = nearest(key, known)
        raise ConfigError(f"{path}: {key} is no key of what it extends{hint}")


def _is_typo(key: str, known: list[str]) -> bool:
    """Whether a recipe's new key is more likely a slip.

    It is one in a section to which recipes add no keys, and in a section of almost another's name.
    """
    section = key.split(".")[0]
    names = {k.split(".")[0] for k in known} - set(DECIDED_ELSEWHERE)
    if section not in names and section != key:
        return bool(difflib.get_close_matches(section, names, n=1, cutoff=0.75))
    return section not in OPEN and key not in known


def _with_data(values: Values, name: str, schema: Schema) -> Values:
    """The values with the `data` section of another data set in the place of theirs."""
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
    """The shared part of a preset (trainer, data, logger), then the recipe's own: key -> text."""
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
    """Words key=value as key -> text. ConfigError: not of that form, or a key that comes twice."""
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
    """key=value words in which `changes` take the place of those with the same key.

    For a command with settings of its own, over which a user's stand.
    """
    changes = list(changes)
    keys = {word.partition("=")[0] for word in changes}
    return [*(word for word in words if word.partition("=")[0] not in keys), *changes]


def merge(
    config: DictConfig, texts: Mapping[str, object], schema: Schema | None = None
) -> DictConfig:
    """`texts` over the values of a config, each read as its key demands.

    schema: what the keys take; None: what their values are in `config`.
    """
    values = dict(_leaves(config))
    _update(values, texts, schema)
    return OmegaConf.create(_nested(values))


def _update(
    values: Values, texts: Mapping[str, object], schema: Schema | None, where: str = ""
) -> None:
    """Read texts into the values of their keys. ConfigError: there is no such key.

    where: what a message begins with.
    """
    known = list(values)
    for key, text in texts.items():
        if text == {} and key not in known:  # a section in which nothing changes
            continue
        _check_known(key, known, where)
        _set(values, key, text, schema, where)


def _set(values: Values, key: str, text: object, schema: Schema | None, where: str = "") -> None:
    """Read a text as its key demands. ConfigError: it is none of that kind.

    where: what a message begins with.
    """
    before = values.get(key)
    kind = kind_of_value(before) if schema is None else schema.kind(key)
    try:
        values[key] = kind.read(text)
    except WrongValue as error:
        example = kind.example
        if before is not None and not _is_interpolation(before):
            example = one_text(before)
        message = f"{where}{key}={_shown(text)} {_advice(key, text, kind, str(error), example)}"
        raise ConfigError(" ".join(message.split())) from error
    if schema is not None:
        schema.learn(key, values[key])


def _advice(key: str, text: object, kind: Kind, problem: str, example: str) -> str:
    """What is wrong with a text, and what to give in its place."""
    if problem == UNKNOWN:
        problem += nearest(one_text(text), choices(kind))
    advice = f"{problem}: give {kind.name}"
    if f" {example}" not in advice:
        advice += f", for example {key}={example}"
    return advice


def _shown(text: object) -> str:
    """A text for a message, cut where it is long."""
    shown = one_text(text)
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


def _check_known(key: str, known: list[str], where: str) -> None:
    """ConfigError: `key` is none of the keys of a config."""
    keys = [k for k in known if k != "experiment"]
    if key in keys:
        return
    inside = [k for k in keys if k.startswith(f"{key}.")]
    if inside:
        raise ConfigError(
            f"{where}{key} is a section, not a value: give one of {', '.join(inside)}"
        )
    raise ConfigError(f"{where}{key} is no key of this recipe{nearest(key, keys)}: see --help")


def _check_interpolations(config: DictConfig, values: Values, schema: Schema) -> None:
    """Read what a file gives as ${another.key}, now that every key has its value."""
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
    """` (did you mean X?)` for the name that is most like a word; empty where none is like it.

    Upper and lower case count as the same. Whole keys are compared first, then their last parts.
    What Lightning and others call a setting leads to the key here (`ALIASES`).
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
    """Dotted key -> text, or list of texts, of a file; an empty section is {}."""
    texts: dict[str, object] = {}
    for key, part in content.items():
        if isinstance(part, dict) and part:
            texts |= _texts(part, f"{prefix}{key}.")
        else:
            texts[f"{prefix}{key}"] = part
    return texts


def _nested(values: Values) -> dict[str, Any]:
    """Dotted keys and values as sections within sections."""
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
    """Dotted keys and values."""
    leaves: list[tuple[str, Any]] = []
    for name, value in config.items():
        key = f"{prefix}{name!s}"
        if isinstance(value, DictConfig):
            leaves += _leaves(value, f"{key}.")
        else:
            leaves.append((key, value))
    return leaves


def plain(config: DictConfig, resolve: bool = True) -> dict[str, Any]:
    """A config as a dict. resolve: whether ${...} is looked up."""
    return cast("dict[str, Any]", OmegaConf.to_container(config, resolve=resolve))


def _comments(experiment: str) -> dict[str, str]:
    """Dotted key -> the comment that --help shows.

    A file without bases (base.yaml, data/*.yaml) says what a key is; a recipe says where its value
    comes from, which no longer holds where a recipe that extends it gives another.
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
    return of_keys | of_values


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
