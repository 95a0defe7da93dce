"""Runs that a W&B sweep agent starts: translate its command line into key=value arguments."""

import ast
import os

from omegaconf import DictConfig, OmegaConf

from reproduce.config import ConfigError, compose
from reproduce.kinds import DECIMAL, argument_text

# Keys in the recorded config of a run that are not arguments of the run that continues it.
FACTS = {"parameters", "commit", "dirty", "versions", "device", "tf32"}
OF_THE_OLD_RUN = {"_wandb", "experiment", "overrides", "run_dir", "resume", *FACTS}


def in_sweep() -> bool:
    """Whether a W&B sweep agent started this process."""
    return all(os.environ.get(name) for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"))


def agent_arguments(words: list[str], experiment: str) -> list[str]:
    """The arguments of the command line; inside a sweep, translated from what the agent writes.

    An agent writes values as Python does. 8.0 becomes 8 if the recipe has an int for the key, since
    a sweep's q_uniform yields floats. If a parameter has a key of the sweep's own command, the key
    comes twice, and the last value counts. To start a preempted run again, the agent sends the
    whole config of that run, its sections as dicts. Of this config only those values are returned,
    under dotted keys, that differ from the recipe with the same preset and data set.

    ConfigError: the preempted run was of another experiment.
    """
    if not in_sweep():
        return words
    values: dict[str, object] = {}
    for word in words:
        key, separator, text = word.partition("=")
        if separator:
            values |= _leaves(key, _literal(text))
    texts = {key: argument_text(value) for key, value in values.items()}
    first = [f"{key}={texts[key]}" for key in ("preset", "data.name") if key in texts]
    recipe = compose(experiment, first)
    for key, value in values.items():
        is_whole = isinstance(value, float) and value.is_integer()
        if is_whole and type(OmegaConf.select(recipe, key)) is int:
            texts[key] = f"{value:.0f}"
    if "experiment" in values:
        if values["experiment"] != experiment:
            raise ConfigError(
                f"this sweep's runs are of {values['experiment']}: its program is not "
                f"{experiment}'s"
            )
        texts = {key: text for key, text in texts.items() if _differs(key, values[key], recipe)}
    return [
        *(word for word in words if "=" not in word),
        *(f"{key}={text}" for key, text in texts.items()),
    ]


def _differs(key: str, value: object, recipe: DictConfig) -> bool:
    if key in ("preset", "data.name"):  # the recipe has been composed with them
        return value is not None
    return key.split(".")[0] not in OF_THE_OLD_RUN and OmegaConf.select(recipe, key) != value


def _literal(text: str) -> object:
    """The value of a Python literal; any other text (a name, a path, 0x10) stays a text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return text if is_number and DECIMAL.fullmatch(text) is None else value


def _leaves(key: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        return {key: value}
    leaves: dict[str, object] = {}
    for name, part in value.items():
        leaves |= _leaves(f"{key}.{name}", part)
    return leaves
