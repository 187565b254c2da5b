"""The rollout worker: steps environments with one policy version and writes trajectories. A plain class, no Ray."""

# T time, B slots

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from shoal.actors.config import EPISODE
from shoal.actors.episodes import EpisodeCounter
from shoal.actors.self_play import SelfPlayEnvironment
from shoal.envs.boundary import (
    DiscreteActions,
    EnvironmentFault,
    EnvSpec,
    GroupedEnvironment,
    MaskedEnvironment,
    OptionsEnvironment,
    ReportingEnvironment,
    SharedEnvironment,
    SlotGroup,
    StatefulEnvironment,
    StepRows,
    TrialEnvironment,
    VectorEnvironment,
)
from shoal.envs.plain_state import DoesNotFit, read_arrays
from shoal.envs.reports import Reports
from shoal.policy.actions import legal
from shoal.policy.recurrent_policy import RecurrentPolicy
from shoal.policy.resets import State
from shoal.policy.trajectory import FAST_STATE, TrajectoryHeader, TrajectorySpec, allocate, count_valid, to_bytes
from shoal.policy.weights import Weights, WeightsError, load_weights


class RolloutWorker:
    """All slots of one actor, with their memory.

    Slots whose environments step elsewhere come in groups: while one is stepped, the others are acted for. What is
    shipped is the same.

    State kept between unrolls: the environments, the memory by ``training_env_id``, row 0 of the next unroll (which was
    row T of the last), the random stream, and the sequence number.

    It alone decides where the memory is zeroed (``actor.reset_memory``): at ``is_first``, or, where the memory is
    carried across episodes, at those of these rows at which the environment ``begins_anew``.
    """

    def __init__(
        self,
        envs: VectorEnvironment,
        policy: RecurrentPolicy,
        unroll_length: int,
        *,
        run_id: str,
        actor: int,
        restart_index: int,
        seed: int,
        burn_in: int = 0,
        reset_memory: str = EPISODE,
    ) -> None:
        self.envs, self.policy = envs, policy.eval().requires_grad_(False)
        carries = reset_memory != EPISODE
        self.spec = trajectory_spec(envs.spec, unroll_length, burn_in, policy.core.state_shapes, carries)
        self._reset_memory = reset_memory
        self._resets = "memory_reset" if carries else "is_first"
        """The column of rows before which the memory is zeroed."""
        self._identity = (run_id, actor, restart_index)
        self._sequence = 0
        self._pack_seconds = 0.0
        """Packing time of the previous unroll: that of the current one is known only after it was written."""
        self._policy_version = -1
        self._env_options: Mapping[str, Any] | None = None
        self._generator = torch.Generator().manual_seed(seed)
        # Unique in the run: the actor's index and the slot's. A replaced actor starts with an empty memory.
        self.training_env_ids = tuple(actor * 2**32 + slot for slot in range(envs.num_envs))
        self._episodes = EpisodeCounter(envs.num_envs)
        self._columns = allocate(self.spec, envs.num_envs)
        self._columns["training_env_id"][:] = self.training_env_ids
        self._self_play = envs if isinstance(envs, SelfPlayEnvironment) else None
        self._shared = envs if isinstance(envs, SharedEnvironment) else None
        self._masks = envs.action_mask if envs.spec.num_mask and isinstance(envs, MaskedEnvironment) else None
        self._reset()
        self._columns["is_first"][:, 0] = self._columns[self._resets][:, 0] = 1
        self._is_fresh = True
        """Nothing was done since the first reset."""
        self._begins_anew = (
            envs.begins_anew if isinstance(envs, TrialEnvironment) else np.zeros(envs.num_envs, np.bool_)
        )
        elsewhere = list(envs.groups) if isinstance(envs, GroupedEnvironment) else []
        self._groups = [self._make_group(group.slots, group) for group in elsewhere]
        if not elsewhere:
            self._groups = [self._make_group(slice(0, envs.num_envs), None)]
        self._closed = False
        self._burn_in_state = self._state()
        if burn_in:
            # Nothing came before, and row 0 is a reset: what these lead to reaches nothing.
            self._columns["burn_in_obs"].fill(0)
            self._columns["burn_in_is_first"].fill(1)

    def _make_group(self, slots: slice, elsewhere: SlotGroup | None) -> _Group:
        """A group, with every row's views into the unroll's buffers once for all unrolls."""
        columns = {name: column[slots] for name, column in self._columns.items()}
        names = ("is_first", "terminated", "truncated", self._resets)
        flags = {name: columns[name].view(np.bool_) for name in names}
        steps = range(self.spec.unroll_length)
        ids = self.training_env_ids[slots]
        return _Group(
            slots,
            elsewhere,
            ids,
            np.zeros(len(ids), np.bool_),
            [(torch.from_numpy(columns["obs"][:, t]), torch.from_numpy(flags[self._resets][:, t])) for t in steps],
            [torch.from_numpy(columns["action"][:, t]) for t in steps],
            [torch.from_numpy(columns["behavior_log_prob"][:, t]) for t in steps],
            [
                torch.from_numpy(columns["action_mask"][:, t].view(np.bool_)) if self.spec.num_mask else None
                for t in steps
            ],
            [columns["action"][:, t] for t in steps],
            [
                StepRows(
                    columns["obs"][:, t + 1],
                    flags["is_first"][:, t + 1],
                    columns["reward"][:, t],
                    flags["terminated"][:, t],
                    flags["truncated"][:, t],
                    columns["final_obs"][:, t] if self.spec.same_step else None,
                )
                for t in steps
            ],
            [flags["memory_reset"][:, t + 1] for t in steps] if self.spec.carries_memory else [],
        )

    def rollout(self, weights: Weights) -> np.ndarray:
        """Step every slot ``unroll_length`` times with one policy version; the trajectory as Arrow bytes.

        consumes: weights (the newest published)     waits for: the environments
        produces: one trajectory     unblocked by: the pool asking for the next

        Raises:
            WeightsError: the weights are not those that were published, or older than those it acted with before.
            EnvironmentFault: the environments must be built anew.
        """
        *_, payload = self.unroll(weights)
        assert payload is not None
        return payload

    def unroll(self, weights: Weights) -> Generator[np.ndarray | None, float | None, None]:
        """``rollout``, a step at a time: None once all groups have acted, and at last the trajectory.

        For workers that share environments (``actors.teams``); it may be sent the seconds for which the others acted.
        """
        with torch.inference_mode():
            self._load(weights)
            self._begin()
        if weights.env_options is not None and weights.env_options != self._env_options:
            self._set_options(weights.env_options)
            if self._is_fresh:  # it began its episodes before it had any weights, and so without the options
                self._reset()
        self._is_fresh = False
        if self._self_play is not None:
            self._self_play.play_against(weights.opponents)
        actions = self.policy.actions
        uniform = 1 - torch.rand(
            (self.spec.unroll_length, self.envs.num_envs, actions.num_uniform), generator=self._generator
        )
        uniforms = [uniform[:, group.slots] for group in self._groups]
        policy_seconds = env_seconds = 0.0
        # The next unroll's burn-in starts here.
        snapshot = self.spec.unroll_length - self.spec.burn_in if self.spec.burn_in else -1
        mark = time.perf_counter()
        try:
            for t in range(self.spec.unroll_length):
                if t == snapshot:
                    with torch.inference_mode():
                        self._burn_in_state = self._state()
                for group, draws in zip(self._groups, uniforms, strict=True):
                    if t:
                        self._end_step(group, t - 1)
                    now = time.perf_counter()
                    env_seconds += now - mark
                    # Around the policy alone: environments may use torch themselves, also with gradients.
                    with torch.inference_mode():
                        output = self.policy.act(group.inputs[t][0], group.training_env_ids, group.inputs[t][1])
                        action, log_prob = actions.sample(legal(output.logits, group.masks[t]), draws[t])
                        group.actions[t].copy_(action)
                        group.log_probs[t].copy_(log_prob)
                    mark = time.perf_counter()
                    policy_seconds += mark - now
                    self._begin_step(group, t)
                if others := (yield None):
                    mark += others
            for group in self._groups:
                self._end_step(group, self.spec.unroll_length - 1)
        except BaseException:
            if self._groups[0].elsewhere is not None:
                # Steps of other groups may be under way, and nobody will wait for their answers.
                self.close()
            raise
        now = time.perf_counter()
        env_seconds += now - mark
        if self._self_play is not None:
            acting = self._self_play.take_policy_seconds()
            policy_seconds, env_seconds = policy_seconds + acting, env_seconds - acting
        if self._shared is not None:
            env_seconds += self._shared.take_owed_seconds()
        # Row T is not acted on here: it bootstraps this trajectory and comes back as row 0 of the next.
        with torch.inference_mode():
            payload = self._ship({"policy_seconds": policy_seconds, "env_seconds": env_seconds})
        self._pack_seconds = time.perf_counter() - now
        yield payload

    def _begin_step(self, group: _Group, t: int) -> None:
        # A copy where the environment changes it in place: it describes the episodes that this step may end.
        np.copyto(group.short_episode, self.envs.short_episode[group.slots])
        if group.elsewhere is None:
            self.envs.step(group.taken[t], group.rows[t])
        else:
            group.elsewhere.step_begin(group.taken[t])

    def _end_step(self, group: _Group, t: int) -> None:
        rows = group.rows[t]
        if group.elsewhere is not None:
            group.elsewhere.step_end(rows)
        if self._masks is not None:
            self._columns["action_mask"][group.slots, t + 1] = self._masks[group.slots]
        if group.memory_resets:
            np.logical_and(rows.is_first, self._begins_anew[group.slots], out=group.memory_resets[t])
        ended = rows.terminated | rows.truncated
        self._episodes.add(rows.reward, rows.is_first, ended, group.short_episode, group.slots)

    def _load(self, weights: Weights) -> None:
        if weights.policy_version < self._policy_version:
            raise WeightsError(f"weights of version {weights.policy_version} after those of {self._policy_version}")
        if weights.policy_version != self._policy_version:
            weights.verify()
            load_weights(self.policy, weights)
            self._policy_version = weights.policy_version

    def _set_options(self, options: Mapping[str, Any]) -> None:
        """Pass options to the environments, for the episodes that begin from now on."""
        if not isinstance(self.envs, OptionsEnvironment):
            raise EnvironmentFault(
                f"{self.envs.spec.env_id} takes no options, got {dict(options)}; environments of gymnasium and "
                "PettingZoo do"
            )
        self.envs.set_options(dict(options))
        self._env_options = options

    def _reset(self) -> None:
        """Begin an episode in every slot, in row 0."""
        self.envs.reset(self._columns["obs"][:, 0])
        if self._masks is not None:
            self._columns["action_mask"][:, 0] = self._masks

    def _begin(self) -> None:
        columns, burn_in = self._columns, self.spec.burn_in
        if burn_in:
            self._write_state("burn_in", self._burn_in_state)
        if self._sequence:
            if burn_in:
                # Rows T - C .. T - 1 of the last unroll come right before its row T.
                columns["burn_in_obs"][:] = columns["obs"][:, -1 - burn_in : -1]
                columns["burn_in_is_first"][:] = columns[self._resets][:, -1 - burn_in : -1]
            columns["obs"][:, 0] = columns["obs"][:, -1]
            columns["is_first"][:, 0] = columns["is_first"][:, -1]
            if self.spec.carries_memory:
                columns["memory_reset"][:, 0] = columns["memory_reset"][:, -1]
            if self._masks is not None:
                columns["action_mask"][:, 0] = columns["action_mask"][:, -1]
        self._write_state("initial", self._state())

    def _write_state(self, when: str, state: State) -> None:
        for (name, _), part in zip(self.spec.state_shapes, state, strict=True):
            self._columns[f"{when}_{name}"][:] = part.transpose(0, 1).numpy()  # [L, B, ...] to a row per slot

    def _state(self) -> State:
        return self.policy.memory.read(self.training_env_ids) or self.policy.initial_state(self.envs.num_envs)

    def _ship(self, seconds: dict[str, float]) -> np.ndarray:
        run_id, actor, restart_index = self._identity
        faults, self.envs.faults = list(self.envs.faults), []
        told = self.envs.reports.take() if isinstance(self.envs, ReportingEnvironment) else Reports()
        metrics: dict[str, list[float]] = {}
        for _, numbers in told.episodes:
            for name, number in numbers.items():
                metrics.setdefault(name, []).append(number)
        statistics: dict[str, Any] = {
            **seconds,
            "pack_seconds": self._pack_seconds,
            "env_steps": count_valid(self._columns),
            **self._episodes.drain(),
            "faults": faults,
            "episode_metrics": metrics,
            "remarks": {kind: [count, told.examples[kind]] for kind, count in told.counts.items()},
            "ignored_tokens": self._count_ignored_tokens(),
        }
        if self._self_play is not None:
            statistics["games"], statistics["opponent_env_steps"] = self._self_play.take_games()
        header = TrajectoryHeader(
            run_id=run_id,
            actor=actor,
            restart_index=restart_index,
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
        return int(to_box.count_ignored(self._columns["obs"][:, 1:]))

    def get_state(self) -> dict[str, Any]:
        """All that decides later unrolls, as plain data (``envs.plain_state``); between two unrolls.

        Memory and the rows of the next burn-in are in it, weights are not.
        """
        rows = self._last_rows()
        state: dict[str, Any] = {
            "sequence": self._sequence,
            "reset_memory": self._reset_memory,
            "random": self._generator.get_state().numpy(),
            "memory": self._named(self._state()),
            "rows": {name: row.copy() for name, row in rows.items()},
            "episodes": self._episodes.get_state(),
            "env": self.envs.get_state() if isinstance(self.envs, StatefulEnvironment) else None,
        }
        if self.spec.burn_in:
            state["burn_in"] = self._named(self._burn_in_state)
        return state

    def _named(self, state: State) -> dict[str, np.ndarray]:
        """Copies of the state's tensors by name."""
        names = (name for name, _ in self.spec.state_shapes)
        return {name: _array(part).copy() for name, part in zip(names, state, strict=True)}

    def set_state(self, state: Any) -> dict[int, str]:
        """Go on from ``get_state`` of an equal worker; this one has made no unroll yet.

        Return the slots that begin an episode instead, each with the reason: their environments could not go on.
        """
        self._is_fresh = False
        slots = range(self.envs.num_envs)
        if isinstance(state, dict) and type(sequence := state.get("sequence")) is int and sequence >= 0:
            # In any case: the rows of the first unroll are row T of the last, and a number is used once.
            self._sequence = sequence
        else:
            return dict.fromkeys(slots, "its worker's state is missing")
        first = self._columns["obs"][:, 0].copy()
        rows = self._last_rows()
        # Until it is known that they go on, all begin an episode.
        for name, row in rows.items():
            row[:] = first if name == "obs" else 1 if name != "burn_in_obs" else 0
        if self._masks is not None:
            rows["action_mask"][:] = self._masks
        try:
            if (before := state.get("reset_memory", EPISODE)) != self._reset_memory:
                raise DoesNotFit(
                    f"its memory was made with actor.reset_memory={before}, now it is {self._reset_memory}"
                )
            memory = read_arrays(state.get("memory"), self._named(self._state()))
            burn_in = read_arrays(state.get("burn_in"), memory) if self.spec.burn_in else memory
            saved = read_arrays(state.get("rows"), rows)
            episodes = read_arrays(state.get("episodes"), self._episodes.get_state())
            random = read_arrays(state, {"random": self._generator.get_state().numpy()})["random"]
            if any(saved[name].max(initial=0) > 1 for name in rows if name not in ("obs", "burn_in_obs")):
                raise DoesNotFit("a flag is neither 0 nor 1")
            self._generator.set_state(torch.from_numpy(random.copy()))
        except (DoesNotFit, RuntimeError) as error:  # torch refuses a damaged stream so
            return dict.fromkeys(slots, str(error))
        failed = dict.fromkeys(slots, f"{self.envs.spec.env_id} does not say its state")
        if isinstance(self.envs, StatefulEnvironment):
            failed = self.envs.set_state(state.get("env"), first)
        going_on = np.array([slot not in failed for slot in slots])
        rows["obs"][~going_on] = first[~going_on]
        for name, row in rows.items():
            row[going_on] = saved[name][going_on]
        if self._masks is not None:
            rows["action_mask"][~going_on] = self._masks[~going_on]
        for sums in episodes.values():
            sums[~going_on] = 0
        self._episodes.set_state(episodes)
        # The first row of those that begin an episode resets their memory.
        for group in self._groups:
            kept = tuple(torch.from_numpy(part[:, group.slots].copy()) for part in memory.values())
            self.policy.memory.write(group.training_env_ids, kept)
        self._burn_in_state = tuple(torch.from_numpy(part.copy()) for part in burn_in.values())
        return failed

    def _last_rows(self) -> dict[str, np.ndarray]:
        """The rows that the next unroll begins with, as views: row 0, and before it those of its burn-in."""
        row = self.spec.unroll_length if self._sequence else 0
        columns, burn_in = self._columns, self.spec.burn_in
        names = ("obs", "is_first", "memory_reset", "action_mask")
        rows: dict[str, np.ndarray] = {name: columns[name][:, row] for name in names if name in columns}
        if burn_in and self._sequence:
            before = slice(row - burn_in, row)
            rows |= {"burn_in_obs": columns["obs"][:, before], "burn_in_is_first": columns[self._resets][:, before]}
        return rows

    def close(self) -> None:
        """Close the environments."""
        if not self._closed:
            self._closed = True
            self.envs.close()


class _Group(NamedTuple):
    """Slots that are acted for and stepped together, with their views into the unroll's columns, one per row."""

    slots: slice
    elsewhere: SlotGroup | None
    """Steps these slots in other processes; None where this process steps the whole environment."""
    training_env_ids: tuple[int, ...]
    """The same tuple at every step: the memory then does nothing per id."""
    short_episode: np.ndarray
    """bool [B]: the episode of the step in progress began with a shorter time limit."""
    inputs: list[tuple[torch.Tensor, torch.Tensor]]
    actions: list[torch.Tensor]
    log_probs: list[torch.Tensor]
    masks: list[torch.Tensor | None]
    """bool [B, P]: the legal actions; None where there are no masks."""
    taken: list[np.ndarray]
    """The same memory as ``actions``."""
    rows: list[StepRows]
    memory_resets: list[np.ndarray]
    """bool [B] of the rows after each step; empty where they are the rows' own ``is_first``."""


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def trajectory_spec(
    spec: EnvSpec,
    unroll_length: int,
    burn_in: int = 0,
    state_shapes: Mapping[str, tuple[int, ...]] = MappingProxyType(dict(FAST_STATE)),
    carries_memory: bool = False,
) -> TrajectorySpec:
    """The contract that trajectories of this environment, and of a core with this state, follow."""
    return TrajectorySpec(
        unroll_length,
        spec.obs_shape,
        spec.obs_dtype.name,
        spec.action_shape,
        spec.action_dtype.name,
        num_actions=tuple(map(len, spec.actions.names)) if isinstance(spec.actions, DiscreteActions) else (),
        state_shapes=tuple((name, tuple(shape)) for name, shape in state_shapes.items()),
        same_step=spec.same_step,
        burn_in=burn_in,
        num_mask=spec.num_mask,
        carries_memory=carries_memory,
        float_spans=spec.float_spans,
    )
