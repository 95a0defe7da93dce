"""Runs that a W&B sweep agent starts: what it writes on the command line, as this repository's key=value arguments."""

import ast
import json
import os
import re

from omegaconf import OmegaConf

from reproduce.config import ConfigError, compose

OF_THE_OLD_RUN = {
    "_wandb",
    "experiment",
    "overrides",
    "run_dir",
    "resume",
}  # in its config, but no arguments


def in_sweep() -> bool:
    """Whether a W&B sweep agent started this process."""
    return all(os.environ.get(name) for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"))


def agent_arguments(words: list[str], experiment: str) -> list[str]:
    """The words of the command line or, inside a sweep, what an agent means by them.

    An agent writes Python values; 8.0 becomes 8 where the recipe has an int, as a sweep's q_uniform means it. Where it
    starts a preempted run again it sends that run's whole config, sections as dicts: of these values the ones that
    differ from the recipe (with the same preset and data set) come back, under dotted keys.
    ConfigError: the old run was of another experiment.
    """
    if not in_sweep():
        return words
    values, texts = {}, {}
    for key, _, text in (word.partition("=") for word in words if "=" in word):
        value = _literal(text)
        leaves = _leaves(key, value)
        values |= leaves
        texts |= {key: text} if isinstance(value, str) else {k: _text(v) for k, v in leaves.items()}
    recipe = compose(
        experiment, [f"{key}={texts[key]}" for key in ("preset", "data.name") if key in texts]
    )
    for key, value in values.items():
        if (
            isinstance(value, float)
            and value.is_integer()
            and type(OmegaConf.select(recipe, key)) is int
        ):
            texts[key] = str(int(value))
    if "experiment" in values:
        if values["experiment"] != experiment:
            raise ConfigError(
                f"this sweep's runs are of {values['experiment']}: its program is not {experiment}'s"
            )
        texts = {key: text for key, text in texts.items() if _differs(key, values[key], recipe)}
    return [
        *(word for word in words if "=" not in word),
        *(f"{key}={text}" for key, text in texts.items()),
    ]


def _differs(key: str, value, recipe) -> bool:
    if key in ("preset", "data.name"):  # the recipe has been composed with them
        return value is not None
    return key.split(".")[0] not in OF_THE_OLD_RUN and OmegaConf.select(recipe, key) != value


def _literal(text: str):
    """The value of a Python literal; other text (a name, YAML) as it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _leaves(key: str, value) -> dict[str, object]:
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, part in value.items() for k, v in _leaves(f"{key}.{name}", part).items()}


def _text(value) -> str:
    """A value as text that a recipe's parser reads back: plain strings bare, all else as JSON."""
    if isinstance(value, str) and re.fullmatch(r"[\w./+-]+", value):
        bare = OmegaConf.from_dotlist([f"key={value}"])["key"]
        return value if bare == value else json.dumps(value)
    return json.dumps(value)
