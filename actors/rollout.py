"""The rollout worker: steps environments with one policy version and writes trajectories. A plain class, no Ray."""

# T time, B slots

from __future__ import annotations

import time

import numpy as np
import torch

from actors.episodes import EpisodeCounter
from envs.boundary import DiscreteActions, EnvSpec, StepRows, VectorEnvironment
from policy.memory import State
from policy.recurrent_policy import RecurrentPolicy
from policy.trajectory import TrajectoryHeader, TrajectorySpec, allocate, count_valid, to_bytes
from policy.weights import Weights, WeightsError, load_weights


class RolloutWorker:
    """All slots of one actor, with their memory.

    State kept between unrolls: the environments, the memory by ``training_env_id``, row 0 of the next unroll (which was
    row T of the last), the random stream, and the sequence number.
    """

    def __init__(
        self,
        envs: VectorEnvironment,
        policy: RecurrentPolicy,
        unroll_length: int,
        *,
        run_id: str,
        actor: int,
        incarnation: int,
        seed: int,
        burn_in: int = 0,
    ) -> None:
        self.envs, self.policy = envs, policy.eval().requires_grad_(False)
        self.spec = trajectory_spec(envs.spec, unroll_length, burn_in, policy.lstm.hidden_size)
        self._identity = (run_id, actor, incarnation)
        self._sequence = 0
        self._pack_seconds = 0.0
        """Of the unroll before: this one's are over only when it has been written."""
        self._policy_version = -1
        self._generator = torch.Generator().manual_seed(seed)
        # Unique in the run: the actor's index and the slot's. A replaced actor starts with an empty memory.
        self.training_env_ids = tuple(actor * 2**32 + slot for slot in range(envs.num_envs))
        self._episodes = EpisodeCounter(envs.num_envs)
        self._short = np.zeros(envs.num_envs, np.bool_)
        self._allocate()
        self.envs.reset(self._columns["obs"][:, 0])
        self._columns["is_first"][:, 0] = 1
        self._burn_in_state = self._state()
        if burn_in:
            # Nothing came before, and row 0 is a reset: what these lead to reaches nothing.
            self._columns["burn_in_obs"].fill(0)
            self._columns["burn_in_is_first"].fill(1)

    def _allocate(self) -> None:
        """The unroll's buffers, and every row's views into them once for all unrolls."""
        self._columns = columns = allocate(self.spec, self.envs.num_envs)
        columns["training_env_id"][:] = self.training_env_ids
        flags = {name: columns[name].view(np.bool_) for name in ("is_first", "terminated", "truncated")}
        steps = range(self.spec.unroll_length)
        self._inputs = [
            (torch.from_numpy(columns["obs"][:, t]), torch.from_numpy(flags["is_first"][:, t])) for t in steps
        ]
        self._actions = [torch.from_numpy(columns["action"][:, t]) for t in steps]
        self._log_probs = [torch.from_numpy(columns["behavior_log_prob"][:, t]) for t in steps]
        self._rows = [
            StepRows(
                columns["obs"][:, t + 1],
                flags["is_first"][:, t + 1],
                columns["reward"][:, t],
                flags["terminated"][:, t],
                flags["truncated"][:, t],
                columns["final_obs"][:, t] if self.spec.same_step else None,
            )
            for t in steps
        ]

    @torch.inference_mode()
    def rollout(self, weights: Weights) -> np.ndarray:
        """Step every slot ``unroll_length`` times with one policy version; the trajectory as Arrow bytes.

        consumes: weights (the newest published)     waits for: the environments
        produces: one trajectory     unblocked by: the pool asking for the next

        Raises:
            WeightsError: the weights are not those that were published, or older than those it acted with before.
            EnvironmentFault: the environments must be built anew.
        """
        self._load(weights)
        columns, actions = self._columns, self.policy.actions
        self._begin()
        uniform = 1 - torch.rand(
            (self.spec.unroll_length, self.envs.num_envs, actions.num_uniform), generator=self._generator
        )
        policy_seconds = env_seconds = 0.0
        # The next unroll's burn-in starts here.
        snapshot = self.spec.unroll_length - self.spec.burn_in if self.spec.burn_in else -1
        mark = time.perf_counter()
        for t, rows in enumerate(self._rows):
            if t == snapshot:
                self._burn_in_state = self._state()
            output = self.policy.act(self._inputs[t][0], self.training_env_ids, self._inputs[t][1])
            action, log_prob = actions.sample(output.logits, uniform[t])
            self._actions[t].copy_(action)
            self._log_probs[t].copy_(log_prob)
            now = time.perf_counter()
            policy_seconds += now - mark
            # A copy where the environment changes it in place: it describes the episodes that this step may end.
            np.copyto(self._short, self.envs.short_episode)
            self.envs.step(columns["action"][:, t], rows)
            self._episodes.add(rows.reward, rows.is_first, rows.terminated | rows.truncated, self._short)
            mark = time.perf_counter()
            env_seconds += mark - now
        # Row T is not acted on here: it bootstraps this trajectory and comes back as row 0 of the next.
        payload = self._ship({"policy_seconds": policy_seconds, "env_seconds": env_seconds})
        self._pack_seconds = time.perf_counter() - mark
        return payload

    def _load(self, weights: Weights) -> None:
        if weights.policy_version < self._policy_version:
            raise WeightsError(f"weights of version {weights.policy_version} after those of {self._policy_version}")
        if weights.policy_version != self._policy_version:
            weights.verify()
            load_weights(self.policy, weights)
            self._policy_version = weights.policy_version

    def _begin(self) -> None:
        columns, burn_in = self._columns, self.spec.burn_in
        if burn_in:
            _write_state(columns, "burn_in", self._burn_in_state)
        if self._sequence:
            if burn_in:
                # Rows T - C .. T - 1 of the last unroll come right before its row T.
                columns["burn_in_obs"][:] = columns["obs"][:, -1 - burn_in : -1]
                columns["burn_in_is_first"][:] = columns["is_first"][:, -1 - burn_in : -1]
            columns["obs"][:, 0] = columns["obs"][:, -1]
            columns["is_first"][:, 0] = columns["is_first"][:, -1]
        _write_state(columns, "initial", self._state())

    def _state(self) -> State:
        return self.policy.memory.read(self.training_env_ids) or self.policy.initial_state(self.envs.num_envs)

    def _ship(self, seconds: dict[str, float]) -> np.ndarray:
        run_id, actor, incarnation = self._identity
        faults, self.envs.faults = list(self.envs.faults), []
        statistics = {
            **seconds,
            "pack_seconds": self._pack_seconds,
            "env_steps": count_valid(self._columns),
            **self._episodes.drain(),
            "faults": faults,
            "ignored_tokens": self._count_ignored_tokens(),
        }
        header = TrajectoryHeader(
            run_id=run_id,
            actor=actor,
            incarnation=incarnation,
            sequence=self._sequence,
            policy_version=self._policy_version,
            statistics=statistics,
        )
        self._sequence += 1
        return to_bytes(self.spec, header, self._columns)

    def _count_ignored_tokens(self) -> int:
        to_box = getattr(self.policy, "to_box", None)
        if to_box is None:
            return 0
        obs = torch.from_numpy(self._columns["obs"][:, 1:])
        return int(to_box.count_ignored(obs.reshape(-1, *self.spec.obs_shape)))

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()


def _write_state(columns: dict[str, np.ndarray], name: str, state: State) -> None:
    for part, tensor in zip("hc", state, strict=True):
        columns[f"{name}_{part}"][:] = tensor.transpose(0, 1)  # [L, B, H] to a row per slot


def trajectory_spec(spec: EnvSpec, unroll_length: int, burn_in: int = 0, hidden: int = 128) -> TrajectorySpec:
    """The contract that trajectories of this environment follow."""
    return TrajectorySpec(
        unroll_length,
        spec.obs_shape,
        spec.obs_dtype.name,
        spec.action_shape,
        spec.action_dtype.name,
        num_actions=tuple(map(len, spec.actions.names)) if isinstance(spec.actions, DiscreteActions) else (),
        hidden=hidden,
        same_step=spec.same_step,
        burn_in=burn_in,
    )
