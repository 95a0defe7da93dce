"""What a run folder asks of a run that goes on in it, and of the machine."""

import torch
from omegaconf import OmegaConf

from flows.glow import Glow
from reproduce.config import ConfigError, compose
from reproduce.run_folder import check_checkpoint

TINY_GLOW = ["preset=cpu", "flow.n_levels=1", "flow.depth=1", "flow.hidden_channels=2"]


class Module(torch.nn.Module):
    """What `check_checkpoint` reads of an objective."""

    def __init__(self, config, lr=0.25):
        super().__init__()
        self.flow = Glow((3, 2, 2), **config.flow)

    def constructors(self):
        return {"optim": type(self), "eval": type(self), "flow": Glow}


def checked(path, stored, config, module=None):
    """The message with which a checkpoint of the config `stored` is refused; None where it is taken."""
    module = module or Module(config)
    origin = {"experiment": config.experiment, "config": stored, "commit": "0123abc"}
    checkpoint = {"paperflows": origin, "state_dict": module.state_dict()}
    try:
        check_checkpoint(path, checkpoint, config, module, 1)
    except ConfigError as error:
        return str(error)


def test_a_key_that_a_recipe_has_got_since_counts_as_its_default(tmp_path):
    """Until additive Glow extended glow_cifar10 its recipe had no min_scale; the flow's own is 0."""
    path = tmp_path / "step-00000001.ckpt"
    config = compose("glow_cifar10_additive5bit", TINY_GLOW)
    old = OmegaConf.to_container(config)
    del old["flow"]["min_scale"]
    assert checked(path, old, config) is None
    other = compose("glow_cifar10_additive5bit", [*TINY_GLOW, "flow.min_scale=0.5"])
    assert f"{path} was trained with flow.min_scale=0.0: say the same" in checked(path, old, other)
    del old["flow"]["depth"]  # the default is 32
    assert f"{path} was trained with flow.depth=32: say the same" in checked(path, old, config)


def test_a_key_that_a_recipe_no_longer_has_counts_as_its_default(tmp_path):
    config = compose("glow_cifar10_additive5bit", TINY_GLOW)
    old = OmegaConf.to_container(config)
    OmegaConf.set_struct(config, False)
    del config.flow["min_scale"]
    assert checked(tmp_path, old, config) is None
    old["flow"]["min_scale"] = 0.5
    assert f"{tmp_path} was trained with flow.min_scale=0.5: say the same" in checked(
        tmp_path, old, config
    )


def test_the_defaults_of_an_objective_count_too_also_those_that_it_hands_on(tmp_path):
    class Objective(Module):
        def __init__(self, config, betas=(0.9, 0.999), **arguments):
            super().__init__(config, **arguments)

    config = compose("glow_cifar10", TINY_GLOW)
    old = OmegaConf.to_container(config)
    config.optim.betas, config.optim.lr = [0.9, 0.999], 0.25
    del old["optim"]["betas"], old["optim"]["lr"]
    assert checked(tmp_path, old, config, Objective(config)) is None


def test_how_many_noise_samples_are_evaluated_may_change_in_a_run_that_goes_on(tmp_path):
    config, more = (
        compose("glow_cifar10", [*TINY_GLOW, f"eval.noise_samples={k}"]) for k in (1, 4)
    )
    assert checked(tmp_path, OmegaConf.to_container(config), more) is None
    other = compose("glow_cifar10", [*TINY_GLOW, "eval.noise_seed=4"])
    assert "was trained with eval.noise_seed=0" in checked(
        tmp_path, OmegaConf.to_container(config), other
    )
