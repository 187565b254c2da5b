"""``shoal.load_policy``: a trained policy that acts, with its memory, in the environment's own terms."""

# B rows, L layers, H hidden

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shoal.actors.config import EPISODE
from shoal.deploy.evaluation.evaluate import fitted_setup
from shoal.deploy.evaluation.saved_run import reset_memory_of, trained_arguments
from shoal.deploy.library.caller import torch_defaults
from shoal.envs.actions import action_converter, row_of
from shoal.envs.boundary import EnvSpec
from shoal.envs.config import EnvConfig
from shoal.envs.masks import KEY, MaskSource
from shoal.envs.spaces import Declared, declared_from_json, make_spec
from shoal.envs.writers import Malformed, make_writer
from shoal.learner.checkpoint import Checkpoint, find_checkpoint, refusing_damage
from shoal.policy.actions import Discrete, legal
from shoal.policy.recurrent_policy import RecurrentPolicy

NumpyState = tuple[np.ndarray, ...]
"""Each tensor of the core's state, float32 [L, ...]; of the LSTM (h, c), each [L, H]."""


class TrainedPolicy:
    """A policy with its weights, which acts on the CPU; made by ``load_policy``.

    It keeps one state for every ``training_env_id``: any integer that names an environment (one agent in it).
    """

    def __init__(
        self,
        network: RecurrentPolicy,
        declared: Declared | None,
        spec: EnvSpec | None,
        *,
        greedy: bool,
        seed: int,
        memory_reset: str = EPISODE,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        """The network itself, a ``torch.nn.Module``."""
        self.greedy = greedy
        self._generator = torch.Generator().manual_seed(seed)
        self.memory_reset = memory_reset
        """Where the run zeroed the memory, and so should who acts (``actor.reset_memory``): ``episode``, ``never`` or
        ``info:KEY``."""
        self.declared = declared
        """The spaces of the environment; None of weights that were trained elsewhere."""
        self._spec = spec

    @torch.inference_mode()
    def act(
        self,
        obs: Any,
        training_env_ids: int | Sequence[int] = 0,
        is_first: bool | Sequence[bool] | np.ndarray = False,
        action_mask: Any = None,
    ) -> Any:
        """The actions for observations, in the environment's own terms; the memory goes one step on.

        With one id, ``obs`` is what one environment gave, and the action is what it takes. With B ids it is a batch as
        ``gymnasium.vector`` has it: every array (in a Dict or Tuple: of every part) has a first dimension of B, and so
        has the action.

        Args:
            obs: of the space that the policy was trained with: numpy arrays, or dicts and tuples of them.
            training_env_ids: the environments; an id that was never seen starts with a zero state.
            is_first: whether the state is zeroed before: at the first observation of an episode; where the run carried
                its memory across episodes (``memory_reset``), only of one that begins anew, such as a trial's first.
                One value for all, or bool [B].
            action_mask: which actions are legal, as the environment tells it in ``info["action_mask"]``; None where all
                are, or where ``obs`` tells it.

        Returns:
            A numpy scalar or array, or an array of B of them; of Box actions the sample or the mean, clipped to the
            bounds. Of a Dict or Tuple of actions a dict or tuple of these.

        Raises:
            ValueError: the observations are not of the policy's space, the mask is not of its actions, or ids repeat.
        """
        one = isinstance(training_env_ids, int | np.integer)
        ids = (int(training_env_ids),) if one else tuple(int(env_id) for env_id in training_env_ids)  # type: ignore[arg-type,union-attr]
        first = np.asarray(is_first)
        if first.dtype != np.bool_ or first.shape not in ((), (len(ids),)):
            raise ValueError(f"is_first must be bool, one or {len(ids)}, got {first.dtype} {list(first.shape)}")
        network, actions = self.network, self.network.actions
        obs, masks = self._split_mask(obs, action_mask, len(ids), one=one)
        rows = self._rows(obs, len(ids), one=one)
        output = network.act(torch.from_numpy(rows), ids, torch.from_numpy(np.broadcast_to(first, (len(ids),)).copy()))
        logits = legal(output.logits, masks)
        if self.greedy:
            chosen = actions.mode(logits)
        else:
            uniform = 1 - torch.rand((len(ids), actions.num_uniform), generator=self._generator)
            chosen = actions.sample(logits, uniform)[0]
        taken = chosen.numpy()
        if self.declared is not None:
            taken = action_converter(self.declared.action)(taken)
        return row_of(taken, 0) if one else taken

    def _split_mask(self, obs: Any, mask: Any, batch: int, *, one: bool) -> tuple[Any, torch.Tensor | None]:
        """(observations without a mask, bool [B, P] or None where every action is legal)."""
        actions = self.network.actions
        source = self.declared.mask if self.declared is not None else None
        if source is None and mask is not None and isinstance(actions, Discrete):
            source = MaskSource("info", tuple(map(len, actions.names)))
        if source is None:
            if mask is not None:
                raise ValueError("the policy's actions are continuous and take no action_mask")
            return obs, None
        rows = np.ones((batch, sum(source.sizes)), np.uint8)
        try:
            rest, told = source.split(obs, {KEY: mask})
            if told is not None:
                for index, row in enumerate(rows):
                    source.write(told if one else _row_of(told, index), row)
        except Malformed as error:
            raise ValueError(str(error)) from error
        return rest, torch.from_numpy(rows.view(np.bool_))

    def _rows(self, obs: Any, batch: int, *, one: bool) -> np.ndarray:
        """[B, *observation.shape] in the observation's dtype."""
        observation = self.network.observation
        dtype = np.dtype(observation.dtype)
        rows = np.empty((batch, *observation.shape), dtype)
        if self.declared is None or self._spec is None:
            given = np.asarray(obs)[None] if one else np.asarray(obs)
            if given.shape != rows.shape or not np.can_cast(given.dtype, dtype, "same_kind"):
                raise ValueError(
                    f"expected observations {dtype} {list(rows.shape)}, got {given.dtype} {list(given.shape)}"
                )
            rows[:] = given
            return rows
        try:
            make_writer(self.declared.observation, self._spec, batched=not one)(obs, rows.reshape(batch, -1))
        except Malformed as error:
            raise ValueError(f"{error} (the policy's observation space is {self.declared.observation})") from error
        return rows

    def reset_memory(self, training_env_ids: int | Sequence[int] | None = None) -> None:
        """Zero the states of these environments, or of all if None."""
        if isinstance(training_env_ids, int):
            training_env_ids = (training_env_ids,)
        self.network.reset_memory(training_env_ids)

    def get_memory(self) -> dict[int, NumpyState]:
        """A copy of every state by ``training_env_id``; of the LSTM (h, c), each float32 [L, H]."""
        return {env_id: tuple(part.numpy() for part in state) for env_id, state in self.network.get_memory().items()}

    def set_memory(self, states: Mapping[int, NumpyState]) -> None:
        """Replace all states by ``states``, as ``get_memory`` returns them.

        Raises:
            ValueError: a state has another shape.
        """
        self.network.set_memory(
            {env_id: tuple(torch.tensor(part) for part in state) for env_id, state in states.items()}
        )


def _row_of(masks: Any, index: int) -> Any:
    return tuple(part[index] for part in masks) if isinstance(masks, tuple) else masks[index]


def load_policy(path: str | Path, *, greedy: bool = False, seed: int = 0) -> TrainedPolicy:
    """Load a trained policy, with an empty memory. The environment need not be installed.

    Args:
        path: a run directory, or one of its checkpoints.
        greedy: take the most probable action instead of sampling.
        seed: of sampled actions.

    Raises:
        CheckpointError: there is no checkpoint, or it holds what no run saved.
        ValueError: the policy is a class that cannot be imported here; the message names it.
    """
    checkpoint = find_checkpoint(Path(path))
    with torch_defaults(), refusing_damage(checkpoint.path, passed_on=ValueError):
        return _load(checkpoint, greedy=greedy, seed=seed)


def _load(checkpoint: Checkpoint, *, greedy: bool, seed: int) -> TrainedPolicy:
    saved = checkpoint.state.get("spaces")
    if not saved:
        memory_reset = reset_memory_of(checkpoint)
        return TrainedPolicy(checkpoint.make_policy(), None, None, greedy=greedy, seed=seed, memory_reset=memory_reset)
    state, declared = checkpoint.state, declared_from_json(saved)
    kwargs, options = trained_arguments(checkpoint)
    spec = make_spec(state["env_id"], declared, options)
    env = EnvConfig(
        id=state["env_id"],
        num_envs=state["config"]["env"]["num_envs"],
        kwargs=kwargs,
        **dataclasses.asdict(options),
    )
    network = fitted_setup(checkpoint, env, spec, seed=seed).make_policy()
    network.load_state_dict(checkpoint.load_weights())
    return TrainedPolicy(network, declared, spec, greedy=greedy, seed=seed, memory_reset=reset_memory_of(checkpoint))
