"""The encoder of SRFlow that a run starts from: the key `flow.encoder_checkpoint` of a recipe."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig
from torch import Tensor

from lightning_modules.objective import Objective
from reproduce.config import ConfigError, plain
from reproduce.run_folder import mismatch, not_finite
from reproduce.stored import Stored, file_sha256, read_stored

KEY = "encoder_checkpoint"
# How the keys of an encoder begin: in a run of RRDB, and in one of SRFlow.
SOURCES = ("network.encoder.", "flow.context_encoder.")
ENCODER = "flow.context_encoder."  # of the module that is loaded


def flow_settings(config: DictConfig) -> dict[str, Any]:
    """The section `flow` of a recipe as arguments of the flow: without `encoder_checkpoint`."""
    return {key: value for key, value in plain(config.flow).items() if key != KEY}


def load_encoder(config: DictConfig, module: Objective) -> dict[str, Any]:
    """Load the weights that `flow.encoder_checkpoint` names into the encoder of a module.

    Returns what result.json says of them: {"encoder": {"model", "file", "sha256", "experiment",
    "commit", "images"}}, or {} without a name. A flow without an encoder has no such key.

    ConfigError, ValueError or FileNotFoundError, one line: there are no such weights, or they do
    not fit. Nothing has been loaded then.
    """
    if KEY not in config.flow:
        return {}
    model = config.flow[KEY]
    if model is None:
        rank_zero_info(
            "flow.encoder_checkpoint=null: the encoder starts from random weights, and is trained "
            "from the first step on"
        )
        return {}
    stored = read_stored(model)
    weights = encoder_weights(stored)
    state = module.state_dict()
    expected = {key: value for key, value in state.items() if key.startswith(ENCODER)}
    problem = mismatch(weights, expected)
    if problem is not None:
        raise ConfigError(
            f"flow.encoder_checkpoint={model} does not fit the encoder of this flow: "
            f"{stored.path} {problem}; give flow.scale, flow.encoder_blocks, "
            f"flow.encoder_channels and flow.encoder_growth as {stored.origin['experiment']} has "
            "them"
        )
    wrong = not_finite(weights)
    if wrong is not None:
        raise ConfigError(
            f"{stored.path} has values that are not finite, in {wrong.removeprefix(ENCODER)} of "
            f"the encoder: give another flow.{KEY}"
        )
    module.load_state_dict(state | weights)
    origin = stored.origin
    rank_zero_info(
        f"the encoder starts from the weights in {stored.path} "
        f"({origin['experiment']}, commit {origin['commit']})"
    )
    return {
        "encoder": {
            "model": model,
            "file": str(stored.path),
            "sha256": file_sha256(stored.path),
            "experiment": origin["experiment"],
            "commit": origin["commit"],
            "images": (stored.result or {}).get("images"),
        }
    }


def encoder_weights(stored: Stored) -> dict[str, Tensor]:
    """The weights of an encoder by the keys that a module of SRFlow has for them.

    ConfigError: the weights are of a model without such an encoder.
    """
    for source in SOURCES:
        weights = {
            f"{ENCODER}{key.removeprefix(source)}": value
            for key, value in stored.weights.items()
            if key.startswith(source)
        }
        if weights:
            return weights
    raise ConfigError(
        f"{stored.path} is of {stored.origin['experiment']}, which has no encoder of "
        "low-resolution images: give a run of rrdb_... or srflow_..."
    )
