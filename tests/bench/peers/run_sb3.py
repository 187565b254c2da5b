"""sb3-contrib's RecurrentPPO on the common network and environment. Run by ``run.py`` in an environment of its own."""

from __future__ import annotations

from typing import Any

import environment
import gymnasium
import network
import numpy as np
import torch
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn
from window import SLOTS, Window, arguments


class TaskVecEnv(VecEnv):
    """The common environment as stable-baselines3 wants it: same-step, with the last observation in the infos."""

    def __init__(self, task: str, seed: int) -> None:
        super().__init__(SLOTS, *environment.spaces(task))
        self._task = environment.make_environment(task, SLOTS, seed, next_step=False)
        self._actions = np.zeros(SLOTS, dtype=np.int64)
        self._nothing: list[dict[str, Any]] = [{} for _ in range(SLOTS)]

    def reset(self) -> np.ndarray:
        return self._task.reset()

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        obs, reward, terminated, truncated = self._task.step(self._actions)
        infos = self._nothing.copy()
        done = terminated | truncated
        for slot in np.flatnonzero(done):
            infos[slot] = {
                "terminal_observation": self._task.final_obs[slot],
                "TimeLimit.truncated": bool(truncated[slot]),
            }
        return obs, reward, done, infos

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [None] * SLOTS

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        pass

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return [None] * SLOTS

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * SLOTS


class Features(BaseFeaturesExtractor):
    """The encoder."""

    def __init__(self, space: gymnasium.Space[Any]) -> None:
        super().__init__(space, network.HIDDEN)
        self.encoder: nn.Module = nn.Identity()

    def forward(self, obs: Tensor) -> Tensor:
        return self.encoder(obs)


class FastPolicy(RecurrentActorCriticPolicy):
    """One LSTM for actor and critic, trained by both, as the network has it; exact heads.

    ``shared_lstm`` of the library trains the LSTM by the actor alone (the critic's input is detached), which is another
    loss and a little less work; handing the critic's gradient on takes these three methods.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(
            *args,
            **kwargs,
            net_arch=[],
            ortho_init=False,
            features_extractor_class=Features,
            lstm_hidden_size=network.HIDDEN,
            n_lstm_layers=network.LSTM_LAYERS,
            shared_lstm=True,
            enable_critic_lstm=False,
            normalize_images=False,  # the network does it
        )
        space, actions = self.observation_space, self.action_space
        whole = network.Network(space.shape, int(actions.n))
        self.features_extractor = Features(space)
        self.features_extractor.encoder = whole.encoder
        self.pi_features_extractor = self.vf_features_extractor = self.features_extractor
        self.lstm_actor, self.action_net, self.value_net = whole.lstm, whole.actor, whole.critic
        network.check_parameters(self, space.shape)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=args[2](1), eps=1e-5)

    def forward(self, obs: Tensor, lstm_states: Any, episode_starts: Tensor, deterministic: bool = False) -> Any:
        features = self.extract_features(obs)
        core, state = self._process_sequence(features, lstm_states.pi, episode_starts, self.lstm_actor)
        distribution = self._get_action_dist_from_latent(core)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, self.value_net(core), distribution.log_prob(actions), type(lstm_states)(state, state)

    def evaluate_actions(self, obs: Tensor, actions: Tensor, lstm_states: Any, episode_starts: Tensor) -> Any:
        core, _ = self._process_sequence(self.extract_features(obs), lstm_states.pi, episode_starts, self.lstm_actor)
        distribution = self._get_action_dist_from_latent(core)
        return self.value_net(core), distribution.log_prob(actions), distribution.entropy()

    def extract_features(self, obs: Tensor, features_extractor: nn.Module | None = None) -> Tensor:
        # The library would make float32 of the tokens first.
        return self.features_extractor(obs)


class Marks(BaseCallback):
    """A rollout begins when the update before it has ended."""

    def __init__(self, window: Window) -> None:
        super().__init__()
        self._window = window
        self._full = False

    def _on_rollout_start(self) -> None:
        if self.num_timesteps:
            self._full = self._window.add(self.num_timesteps)

    def _on_step(self) -> bool:
        return not self._full


def main() -> None:
    options = arguments()
    recipe = options.recipe
    torch.set_num_threads(options.settings["threads"])
    window = options.window()
    model = RecurrentPPO(
        FastPolicy,
        TaskVecEnv(options.task, options.seed),
        n_steps=recipe.unroll,
        batch_size=recipe.batch // recipe.minibatches,
        n_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        gamma=recipe.gamma,
        gae_lambda=recipe.gae_lambda,
        clip_range=recipe.clip,
        ent_coef=recipe.entropy_coef,
        vf_coef=recipe.value_coef,
        max_grad_norm=recipe.max_grad_norm,
        device="cpu",
        seed=options.seed,
        verbose=0,
    )
    model.learn(10**12, callback=Marks(window))
    window.report(("sb3-contrib", "stable-baselines3"))


if __name__ == "__main__":
    main()
