"""A new run that starts from trained weights: the key `init_from` of a recipe."""

from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig
from torch import Tensor

from lightning_modules.objective import Objective
from reproduce.config import ConfigError
from reproduce.pretrained_encoder import KEY, load_encoder
from reproduce.run_folder import changed_settings, mismatch, not_finite
from reproduce.schema import constructors
from reproduce.stored import Stored, file_sha256, read_stored, shape_text


class InitFrom(L.Callback):
    """Loads the weights that a run starts from, and keeps a record of them in its checkpoints.

    Everything else of the run is new: the optimizer, its learning rate, the steps, averaged
    weights, which start as copies of the loaded ones. ActNorms keep the loaded values, since they
    are initialised.

    The encoder of a flow alone may start from trained weights, too (`pretrained_encoder`).

    record: {} for a run that starts from random weights, else what result.json says: {"init_from":
        {"model", "file", "sha256", "experiment", "commit", "shape", "images"}}, or {"encoder": ...}
        with the same keys but `shape`. model is the setting, file and sha256 those that the weights
        were read from; shape is that of the data that they were trained on, images how many of
        them, or None where that is not known.
    """

    def __init__(self) -> None:
        self.record: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return self.record

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.record = state_dict

    def load(self, config: DictConfig, module: Objective) -> None:
        """Load the weights that `init_from` names into a module. Without a name do nothing.

        Each rank has to call this before `Trainer.fit`, which sets ActNorms that are not set yet,
        and copies the weights of which an average is kept.

        ConfigError, ValueError or FileNotFoundError, one line: there are no such weights, or they
        do not fit. Nothing has been loaded then.
        """
        model = config.get("init_from")
        if model is None:
            self.record = load_encoder(config, module)
            return
        if config.flow.get(KEY) is not None:
            raise ConfigError(
                f"init_from={model} gives all weights: leave out flow.{KEY}={config.flow[KEY]}"
            )
        stored = read_stored(model)
        origin = stored.origin
        _check_model(stored, config, module)
        own = {name for name, _ in module.named_buffers(recurse=False)}  # such as skipped steps
        state = module.state_dict()
        expected = {key: value for key, value in state.items() if key not in own}
        _check_weights(stored, module, expected)
        wrong = not_finite(stored.weights)
        if wrong is not None:
            raise ConfigError(
                f"{stored.path} has values that are not finite, in {wrong}: give another init_from"
            )
        module.load_state_dict(state | stored.weights)
        self.record = {
            "init_from": {
                "model": model,
                "file": str(stored.path),
                "sha256": file_sha256(stored.path),
                "experiment": origin["experiment"],
                "commit": origin["commit"],
                "shape": origin["shape"],
                "images": (stored.result or {}).get("images"),
            }
        }
        rank_zero_info(
            f"starting from the weights in {stored.path} "
            f"({origin['experiment']}, commit {origin['commit']})"
        )


def _check_model(stored: Stored, config: DictConfig, module: Objective) -> None:
    """ConfigError: the weights are of another model, or of one with other settings."""
    origin = stored.origin
    experiment = origin["experiment"]
    if not stored.weights:
        raise ConfigError(
            f"init_from={config.init_from} is of {experiment}, which trains no flow, and holds no "
            "weights of one"
        )
    kind = constructors(experiment).get("flow")
    own_kind = module.constructors().get("flow")
    if isinstance(kind, type) and kind is not own_kind:
        raise ConfigError(
            f"init_from={config.init_from} is a {kind.__name__} of {experiment}, and "
            f"{config.experiment} trains a {module.model_name}: give weights of that"
        )
    changed = [
        setting
        for setting in changed_settings(origin["config"], config, module, ("flow",))
        if not setting.startswith(f"flow.{KEY}=")  # where its encoder came from
    ]
    if changed:
        raise ConfigError(
            f"init_from={config.init_from} was trained with {' '.join(changed)}: say the same"
        )


def _check_weights(stored: Stored, module: Objective, expected: dict[str, Tensor]) -> None:
    """ConfigError: weights are missing, or have other shapes than those of the module."""
    problem = mismatch(stored.weights, expected)
    if problem is None:
        return
    shape = stored.origin["shape"]
    reason = f"use commit {stored.origin['commit']}, which trained them"
    if shape is not None and module.shape is not None and list(module.shape) != list(shape):
        own_shape = shape_text(module.shape)
        reason = f"they are of data of shape {shape_text(shape)}, and here are data of {own_shape}"
    raise ConfigError(f"{stored.path} {problem}; {reason}")
