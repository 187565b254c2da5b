"""Sample Factory's APPO on the common network and environment. Run by ``run.py`` in an environment of its own."""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import environment
import gymnasium
import network
import numpy as np
import torch
from sample_factory.algo.runners.runner import AlgoObserver, Runner
from sample_factory.algo.utils.action_distributions import get_action_distribution
from sample_factory.algo.utils.context import global_model_factory
from sample_factory.algo.utils.tensor_dict import TensorDict
from sample_factory.cfg.arguments import parse_full_cfg, parse_sf_args
from sample_factory.envs.env_utils import register_env
from sample_factory.model.actor_critic import ActorCritic
from sample_factory.model.core import ModelCoreRNN
from sample_factory.train import make_runner
from torch import Tensor
from window import SLOTS, Window, arguments


class TaskVectorEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """The common environment as Sample Factory's batched mode wants it: one environment of many agents, same-step."""

    is_multiagent = True
    render_mode = None

    def __init__(self, task: str, num_agents: int, seed: int) -> None:
        self.num_agents = num_agents
        self.observation_space, self.action_space = environment.spaces(task)
        self._task = environment.make_environment(task, num_agents, seed, next_step=False)
        self._infos: list[dict[str, Any]] = [{} for _ in range(num_agents)]

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, list[dict[str, Any]]]:
        return self._task.reset(), self._infos

    def step(self, action: Any) -> Any:
        return *self._task.step(np.asarray(action)), self._infos


def make_env(name: str, cfg: Any, env_config: Any, render_mode: str | None = None) -> TaskVectorEnv:
    """At module level, because the workers are spawned and unpickle it."""
    agents = SLOTS // (cfg.num_workers * cfg.num_envs_per_worker) if cfg.batched_sampling else 1
    number = 0 if env_config is None else env_config.env_id
    return TaskVectorEnv(name, agents, 1000 * cfg.seed + number)


class FastActorCritic(ActorCritic):
    """The network; the LSTM is run by the library's own core (a PackedSequence in the learner)."""

    def __init__(self, obs_space: Any, action_space: Any, cfg: Any) -> None:
        super().__init__(obs_space, action_space, cfg)
        space = obs_space["obs"]
        self._dtype = torch.uint8 if space.dtype == np.uint8 else torch.float32
        whole = network.Network(space.shape, int(action_space.n))
        self.encoder, self.actor, self.critic = whole.encoder, whole.actor, whole.critic
        self.core = ModelCoreRNN(cfg, network.HIDDEN)
        self.core.core = whole.lstm
        network.check_parameters(self, space.shape)

    def device_for_input_tensor(self, input_tensor_name: str) -> torch.device:
        return torch.device("cpu")

    def type_for_input_tensor(self, input_tensor_name: str) -> torch.dtype:
        return self._dtype

    def forward_head(self, normalized_obs_dict: dict[str, Tensor]) -> Tensor:
        return self.encoder(normalized_obs_dict["obs"])

    def forward_core(self, head_output: Any, rnn_states: Tensor) -> Any:
        return self.core(head_output, rnn_states)

    def forward_tail(self, core_output: Tensor, values_only: bool, sample_actions: bool) -> TensorDict:
        result = TensorDict(values=self.critic(core_output).squeeze(-1))
        if values_only:
            return result
        result["action_logits"] = self.actor(core_output)
        self.last_action_distribution = get_action_distribution(self.action_space, result["action_logits"])
        self._maybe_sample_actions(sample_actions, result)
        return result

    def forward(self, normalized_obs_dict: dict[str, Tensor], rnn_states: Tensor, values_only: bool = False) -> Any:
        core, states = self.forward_core(self.forward_head(normalized_obs_dict), rnn_states)
        result = self.forward_tail(core, values_only, sample_actions=True)
        result["new_rnn_states"] = states
        return result


def make_actor_critic(cfg: Any, obs_space: Any, action_space: Any) -> FastActorCritic:
    return FastActorCritic(obs_space, action_space, cfg)


class Marks(AlgoObserver):
    """The runner hears of every update."""

    def __init__(self, window: Window) -> None:
        self._window = window

    def on_training_step(self, runner: Runner, training_iteration_since_resume: int) -> None:
        if 0 in runner.env_steps and self._window.add(runner.env_steps[0]):
            # Its train_for_seconds is compared with a number that nothing ever changes.
            runner.cfg.train_for_env_steps = 0


def main() -> None:
    chosen = arguments()
    recipe = chosen.recipe
    register_env(chosen.task, make_env)
    global_model_factory().register_actor_critic_factory(make_actor_critic)
    with tempfile.TemporaryDirectory() as directory:
        options = {
            "algo": "APPO",
            "env": chosen.task,
            "device": "cpu",
            "train_dir": directory,
            "seed": chosen.seed,
            "rollout": recipe.unroll,
            "recurrence": recipe.unroll,
            "batch_size": recipe.batch // recipe.minibatches,
            "num_batches_per_epoch": recipe.minibatches,
            "num_epochs": recipe.epochs,
            "learning_rate": recipe.learning_rate,
            "gamma": recipe.gamma,
            "gae_lambda": recipe.gae_lambda,
            "ppo_clip_ratio": recipe.clip,
            "value_loss_coeff": recipe.value_coef,
            "exploration_loss_coeff": recipe.entropy_coef,
            "max_grad_norm": recipe.max_grad_norm,
            "use_rnn": True,
            "rnn_type": "lstm",
            "rnn_size": network.HIDDEN,
            "rnn_num_layers": network.LSTM_LAYERS,
            "normalize_input": False,
            "normalize_returns": False,
            "save_every_sec": 10**6,
            "save_best_every_sec": 10**6,
            "experiment_summaries_interval": 10**6,
            "log_to_file": False,
            "train_for_env_steps": 10**12,
            **chosen.settings,
        }
        argv = [f"--{name}={value}" for name, value in options.items()]
        parser, _ = parse_sf_args(argv)
        _, runner = make_runner(parse_full_cfg(parser, argv))
        window = chosen.window()
        runner.register_observer(Marks(window))
        runner.init()
        runner.run()
    window.report(("sample-factory",))


if __name__ == "__main__":
    sys.exit(main())
