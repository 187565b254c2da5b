"""What the settings name is imported, made and tried on a node before a run uses it. Nodes import it only to answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from shoal.deploy.settings.sections import Config

if TYPE_CHECKING:  # it imports torch, which only what was given as an object needs
    from shoal.actors.user_code import UserCode
    from shoal.envs.config import EnvConfig


SCHEDULES = "learner.schedules."
_STEPS, _SECONDS = 20, 2.0
"""Of random actions, at most: what fails on one node alone is a device, a file or a library, and fails at once."""


class Parts(NamedTuple):
    """What processes of a run make on a node."""

    env: EnvConfig | None
    """The environment; None where no process of the node plays."""
    agents: Mapping[str, Sequence[str]]
    """Patterns of the agents of every policy, where there are several."""
    code: tuple[tuple[str, str], ...]
    """Classes and functions of the user's that are imported, as (setting, ``module:name``)."""
    given: UserCode | None
    """What goes along by value."""


class Failure(NamedTuple):
    """What a node cannot make or play."""

    setting: str
    name: str
    """What the setting names."""
    missing: str
    """The module that is not found there, and who imports it; empty where it is something else."""
    error: str
    """The last error in one line."""
    is_made: bool = False
    """It was made, and fails in its first steps."""


def parts_of(config: Config, *, plays: bool, learns: bool) -> Parts:
    """What the processes of a node make: those of rollout actors where it ``plays``, of a peer learner where it
    ``learns``."""
    from shoal.actors.user_code import UserCode
    from shoal.deploy.placement.setups import patterns_of
    from shoal.learner.config import ADAM, IMPALA, PPO
    from shoal.policy.config import OWN_CORES, OWN_KINDS

    policy, learner = config.policy, config.learner
    code = [("policy.kind", policy.kind, OWN_KINDS), ("policy.core", policy.core, OWN_CORES)]
    if learns:
        code += [("learner.loss", learner.loss, (PPO, IMPALA)), ("learner.optimizer", learner.optimizer, (ADAM,))]
        own = {name: str(one.kind) for name, one in learner.schedules.items() if one.is_own}
        code += [(f"{SCHEDULES}{name}.kind", kind, ()) for name, kind in own.items()]
    schedules = [str(one.kind) for one in learner.schedules.values()]
    given = UserCode.of(config.env.id, policy.kind, policy.core, learner.loss, learner.optimizer, schedules)
    return Parts(
        env=config.env if plays else None,
        agents=patterns_of(config),
        code=tuple((setting, name) for setting, name, ours in code if name not in ours),
        given=None if given == UserCode() else given,
    )


def make_once(parts: Parts) -> list[Failure]:
    """What of these cannot be imported, made or played in this process; the environment is closed again."""
    failures = []
    for setting, name in parts.code:
        try:
            _find(setting, name)
        except (Exception, SystemExit) as error:  # noqa: BLE001  (the user's module: it raises anything)
            failures.append(_failure(setting, name, error))
    if parts.env is not None:
        try:
            fault = _try(parts.env, parts.agents)
        except (Exception, SystemExit) as error:  # noqa: BLE001  (the user's environment: it raises anything)
            # A wrapper is named by the error, if it is the reason.
            setting = "env.wrappers" if "env.wrappers:" in str(error) else "env.id"
            failures.append(_failure(setting, parts.env.id, error))
        else:
            if fault:
                failures.append(Failure("env.id", parts.env.id, "", fault, is_made=True))
    return failures


def _try(env: EnvConfig, agents: Mapping[str, Sequence[str]]) -> str:
    """Make the environment and take its first steps; the fault that ends it in them, or nothing."""
    from shoal.envs.first_steps import take_first_steps

    return take_first_steps(env.id, env.options, env.kwargs, agents, steps=_STEPS, seconds=_SECONDS).fault


def _find(setting: str, name: str) -> None:
    from shoal import given

    known: Mapping[str, Mapping[str, object]] = {
        "policy.kind": given.policies,
        "policy.core": given.cores,
        "learner.loss": given.losses,
        "learner.optimizer": given.optimizers,
    }
    given.find(name, given.schedules if setting.startswith(SCHEDULES) else known[setting])


def _failure(setting: str, name: str, error: BaseException) -> Failure:
    from shoal.envs.raised import raised

    missing = ""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            missing = f"{cause.name!r}{_importer(cause)}"
        cause = cause.__cause__
    said = str(error) if isinstance(error, ValueError) and str(error) else raised(error)
    return Failure(setting, name, missing, said.strip().splitlines()[-1])


def _importer(error: ModuleNotFoundError) -> str:
    """The file and line that import what is missing, unless it was imported by its name in a setting."""
    import importlib
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    if not frames or frames[-1].filename.startswith("<frozen") or frames[-1].filename == importlib.__file__:
        return ""
    file = Path(frames[-1].filename)
    return f", which {Path(*file.parts[-2:])}:{frames[-1].lineno} imports"
