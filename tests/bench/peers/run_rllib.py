"""RLlib's IMPALA and APPO on the common network and environment. Run by ``run.py`` in an environment of its own."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import network
import numpy as np
import ray
import torch
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.appo.torch.appo_torch_learner import APPOTorchLearner
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.impala.torch.impala_torch_learner import IMPALATorchLearner
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.utils import make_target_network
from ray.rllib.core.rl_module.apis import TARGET_NETWORK_ACTION_DIST_INPUTS, TargetNetworkAPI
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.tune.registry import register_env
from torch import Tensor
from vector_env import TaskVectorEnv
from window import SLOTS, Arguments, arguments


class FastModule(TorchRLModule, ValueFunctionAPI, TargetNetworkAPI):
    """The network, with the target network that APPO asks for."""

    def setup(self) -> None:
        self.network = network.Network(self.observation_space.shape, int(self.action_space.n))

    def get_initial_state(self) -> dict[str, np.ndarray]:
        shape = (network.LSTM_LAYERS, network.HIDDEN)
        return {"h": np.zeros(shape, np.float32), "c": np.zeros(shape, np.float32)}

    def _core(self, whole: network.Network, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, T, ...] -> [B, T, HIDDEN] and the state after it."""
        obs, state = batch[Columns.OBS], batch[Columns.STATE_IN]
        features = whole.encoder(obs.flatten(0, 1)).view(*obs.shape[:2], -1)
        h, c = (state[name].transpose(0, 1).contiguous() for name in ("h", "c"))
        core, (h, c) = whole.lstm(features.transpose(0, 1), (h, c))
        return core.transpose(0, 1), {"h": h.transpose(0, 1), "c": c.transpose(0, 1)}

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        core, state = self._core(self.network, batch)
        return {Columns.ACTION_DIST_INPUTS: self.network.actor(core), Columns.STATE_OUT: state}

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        core, state = self._core(self.network, batch)
        logits = self.network.actor(core)
        return {Columns.ACTION_DIST_INPUTS: logits, Columns.STATE_OUT: state, Columns.EMBEDDINGS: core}

    def compute_values(self, batch: dict[str, Any], embeddings: Tensor | None = None) -> Tensor:
        core = self._core(self.network, batch)[0] if embeddings is None else embeddings
        return self.network.critic(core).squeeze(-1)

    def make_target_networks(self) -> None:
        self._target = make_target_network(self.network)

    def get_target_network_pairs(self) -> list[tuple[Any, Any]]:
        return [(self.network, self._target)]

    def forward_target(self, batch: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            core, _ = self._core(self._target, batch)
            return {TARGET_NETWORK_ACTION_DIST_INPUTS: self._target.actor(core)}


class Counted:
    """Notes when each update begins and how many environment steps it trains, whatever process it runs in.

    The library's own counter would take the bootstrap step that it appends to every fragment for a step of the
    environment.
    """

    def compute_loss_for_module(self, *, batch: dict[str, Any], **kwargs: Any) -> Any:
        with Path(os.environ["PEERS_MARKS"]).open("a") as marks:
            marks.write(f"{time.monotonic()} {int(batch[Columns.LOSS_MASK].sum())}\n")
        return super().compute_loss_for_module(batch=batch, **kwargs)


class CountedIMPALA(Counted, IMPALATorchLearner):
    pass


class CountedAPPO(Counted, APPOTorchLearner):
    pass


def make_config(chosen: Arguments) -> Any:
    settings, recipe = chosen.settings, chosen.recipe
    if settings["algorithm"] == "IMPALA":
        config: Any = IMPALAConfig()
        learner: Any = CountedIMPALA
    else:
        config = APPOConfig()
        learner = CountedAPPO
        # By default every sample would be trained twice.
        config.training(
            circular_buffer_num_batches=1,
            circular_buffer_iterations_per_batch=recipe.epochs,
            lambda_=recipe.gae_lambda,
            clip_param=recipe.clip,
        )
    runners = settings["runners"]
    return (
        config.environment(chosen.task)
        .framework("torch")
        .env_runners(
            num_env_runners=runners,
            num_envs_per_env_runner=SLOTS // max(1, runners),
            gym_env_vectorize_mode="vector_entry_point",
            rollout_fragment_length=recipe.unroll,
            num_cpus_per_env_runner=1,
        )
        .learners(
            num_learners=settings["learners"],
            num_cpus_per_learner=1,
            num_gpus_per_learner=0,
            learner_class=learner,
        )
        .rl_module(
            # A fragment has one step more than it was sampled with; a shorter sequence would be cut in two and padded.
            rl_module_spec=RLModuleSpec(
                module_class=FastModule, model_config={"max_seq_len": settings.get("max_seq_len", recipe.unroll + 1)}
            )
        )
        .training(
            train_batch_size_per_learner=recipe.batch,
            num_epochs=1,
            minibatch_size=None,
            lr=recipe.learning_rate,
            gamma=recipe.gamma,
            vf_loss_coeff=recipe.value_coef,
            entropy_coeff=recipe.entropy_coef,
            grad_clip=recipe.max_grad_norm,
            grad_clip_by="global_norm",
            broadcast_interval=1,
            # Its default, 0, makes the coordinating loop spin, which takes the learner's core.
            timeout_s_sampler_manager=settings["timeout"],
        )
        .reporting(min_time_s_per_iteration=2)
        .debugging(seed=chosen.seed, log_level="ERROR")
    )


def main() -> None:
    chosen = arguments()
    torch.set_num_threads(chosen.settings["threads"])
    register_env(chosen.task, lambda context: TaskVectorEnv(chosen.task, context["num_envs"], chosen.seed))
    with tempfile.TemporaryDirectory() as directory:
        marks = Path(directory) / "marks"
        marks.touch()
        os.environ["PEERS_MARKS"] = str(marks)
        # Its own Ray, never one that happens to run here; logical processors for all that may be asked for.
        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=10**9)
        try:
            algorithm = make_config(chosen).build_algo()
            full = False
            while not full:
                algorithm.train()
                window, trained = chosen.window(), 0
                for line in marks.read_text().splitlines():
                    when, steps = line.split()
                    # An update begins when the one before it has ended.
                    full = window.add(trained, float(when))
                    trained += int(steps)
            algorithm.stop()
        finally:
            ray.shutdown()
    window.report(("ray",))


if __name__ == "__main__":
    main()
