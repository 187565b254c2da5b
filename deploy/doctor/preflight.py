"""Everything that can be known to be wrong before a process is started."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from shoal.actors.config import reset_key
from shoal.deploy.placement.hardware import available_cores
from shoal.deploy.placement.layout import Layout, LayoutError, Machine, choose_layout
from shoal.deploy.records.waits import told_if_slow
from shoal.deploy.settings.sections import Config
from shoal.learner.config import ADAM, IMPALA, PPO
from shoal.policy.config import OWN_CORES, OWN_KINDS
from shoal.policy.observation import SMALL, written, written_name
from shoal.problems import problems_of

if TYPE_CHECKING:  # torch and environments are imported where they are used
    from shoal.envs.boundary import EnvSpec
    from shoal.envs.pettingzoo import GroupSpec

MOST_SOCKET_PATH_BYTES = 107
"""Of an AF_UNIX address on Linux, as Ray checks it."""


def check(config: Config, run_dir: Path, known: Sequence[str] = ()) -> list[str]:
    """All problems but those that are ``known``, each with the setting it comes from; makes the environment once."""
    return check_made(config, run_dir, make(config, known), known)


class Made(NamedTuple):
    """What was learned by making the environment."""

    spec: EnvSpec | None = None
    """None where several policies play it, or it cannot be made."""
    teams: Mapping[str, GroupSpec] = {}
    """The agents of each of several policies."""
    problems: Sequence[str] = ()


def check_made(config: Config, run_dir: Path, made: Made, known: Sequence[str] = ()) -> list[str]:
    """``check`` where the environment has been made."""
    layout, found = _layout(config)
    shares, problems = _shares(config, layout, made)
    problems = [*made.problems, *problems, *found]
    if shares:
        problems += _image_encoder(config, [spec for spec, _ in shares])
    if shares and not problems and config.learner.loss not in (PPO, IMPALA):
        from shoal.deploy.doctor.trial_update import check_loss

        wrong = filter(None, (check_loss(config, spec) for spec, _ in shares))
        problems += [f"learner.loss: {problem}" for problem in dict.fromkeys(wrong)]
    if shares and not found:
        from shoal.deploy.placement.memory import check_memory

        problems += check_memory(config, shares, layout)
    return [
        *problems,
        *_metrics(config),
        *_sinks(config),
        *_run_dir(config, run_dir),
        *_ray(config),
        *_resume(config, run_dir),
        *_callbacks(config),
    ]


def make(config: Config, known: Sequence[str]) -> Made:
    """Make the environment once, and close it."""
    from shoal.deploy.doctor.not_made import why_not_made
    from shoal.deploy.placement.setups import patterns_of
    from shoal.envs.registry import make_env_spec
    from shoal.envs.teams import make_team_specs

    env = config.env
    if any(problem.startswith("policies") for problem in known):  # whose agents these are is not known then
        return Made()
    try:
        with told_if_slow(f"making {env.id}"):
            if config.policies:
                return Made(teams=make_team_specs(env.id, env.options, env.kwargs, patterns_of(config)))
            return Made(make_env_spec(env.id, env.options, **env.kwargs))
    except (Exception, SystemExit) as error:  # noqa: BLE001  (other people's code: it raises anything)
        return Made(problems=why_not_made(env.id, error))


def _shares(config: Config, layout: Layout | None, made: Made) -> tuple[list[tuple[EnvSpec, int]], list[str]]:
    """The specs of every policy's agents with their slots, and what is wrong with agents, slots, batches or the
    policies' class."""
    from shoal.deploy.placement.setups import check_slots, games_of, team_shares

    try:
        if made.teams:
            shares = [(own.spec, own.num_slots) for own in team_shares(config, layout, made.teams).values()]
            return shares, list(dict.fromkeys(problem for spec, _ in shares for problem in _own_policy(config, spec)))
        if (spec := made.spec) is None:
            return [], []
        check_slots(config.env, spec.num_agents)
        games_of(config, spec)
    except ValueError as error:
        return [], problems_of(error)
    if reset_key(config.actor.reset_memory) is not None and spec.spaces is None:
        from shoal.actors.worker_setup import no_infos

        return [], [f"actor.reset_memory: {no_infos(config.env.id, config.actor.reset_memory)}"]
    return [(spec, config.env.num_envs)], _own_policy(config, spec)


def _image_encoder(config: Config, specs: Sequence[EnvSpec]) -> list[str]:
    """What is wrong with ``policy.image_encoder`` for observations of which at least one must have what it names."""
    from shoal.envs.boundary import DictSpace, ImageSpace

    choice, spaces = config.policy.image_encoder, [spec.observation for spec in specs]
    named = list(dict.fromkeys(name for space in spaces if isinstance(space, DictSpace) for name, _ in space.images))
    alone = any(isinstance(space, ImageSpace) for space in spaces)
    if isinstance(choice, str):
        unread = choice != SMALL and not named and not alone
        return [f"policy.image_encoder: {choice} is for images, and {config.env.id} has none; leave it out"] * unread
    if not choice or not (unknown := sorted(choice.keys() - set(named))):
        return []
    if named:
        missing, known = (", ".join(map(written_name, names)) for names in (unknown, named))
        return [f"policy.image_encoder names {missing}; images of {config.env.id} are {known}"]
    if not alone:
        return [f"policy.image_encoder: {written(choice)} is for images, and {config.env.id} has none; leave it out"]
    return [
        f"policy.image_encoder: {written(choice)} is for the images of a Dict or Tuple, and the observation of "
        f"{config.env.id} is one image: name the encoder alone"
    ]


def _own_policy(config: Config, spec: EnvSpec) -> list[str]:
    """What is wrong with a policy class or a core of the user's, found by making one and trying it."""
    policy = config.policy
    if policy.kind in OWN_KINDS and policy.core in OWN_CORES and not policy.core_kwargs:
        return []
    import torch
    from shoal.deploy.placement.setups import make_worker_setup
    from shoal.envs.raised import raised
    from shoal.policy.cores import check_core
    from shoal.policy.kinds import check_policy

    try:
        with torch.random.fork_rng(devices=()):
            made = make_worker_setup(config, spec, run_id="").make_policy(config.policy.initialization)
            check_core(made.core, made.core_name)
            check_policy(made)
    except (Exception, SystemExit) as error:  # noqa: BLE001  (the user's code: it raises anything)
        text = str(error) if isinstance(error, ValueError) else raised(error)
        if text.startswith("core "):
            return [f"policy.core: {text.removeprefix('core ')}"]
        return [f"policy.kind: {text.removeprefix('policy ')}"]
    return []


def _layout(config: Config) -> tuple[Layout | None, list[str]]:
    """The layout, which is not known in a cluster before its nodes are, and its problems."""
    from shoal.learner.device_choice import check_device, check_precision, make_device_path
    from shoal.learner.optimizer import check_optimizer
    from shoal.learner.schedules import check_schedules

    if problem := check_device(config.learner):
        return None, [f"learner.device: {problem}"]
    if problem := check_precision(config.learner):
        return None, [f"learner.precision: {problem}"]
    device = make_device_path(config.learner).device
    if device.type == "mps" and config.learner.num_learners not in ("auto", 1):
        return None, [
            "learner.num_learners: Apple's MPS cannot add up gradients between processes; set learner.device=cpu"
        ]
    if config.learner.optimizer != ADAM and (problem := check_optimizer(config.learner)):
        return None, [f"learner.optimizer: {problem}"]
    if wrong := check_schedules(config.learner):
        return None, wrong
    if config.mode == "cluster":
        return None, []
    try:
        return choose_layout(config, Machine(cores=available_cores(), accelerator=device.type != "cpu")), []
    except LayoutError as error:
        return None, problems_of(error)


def _metrics(config: Config) -> list[str]:
    from shoal.deploy.monitoring.access import problems
    from shoal.deploy.monitoring.endpoint import access_files

    if config.metrics.port < 0:
        return []
    found = _listen(config.metrics.address, config.metrics.port)
    if files := access_files(config.metrics):
        settings = {"token": "token_file", "certificate": "tls_certificate"}
        found += [f"metrics.{settings[field]}: {problem}" for field, problem in problems(files).items()]
    if config.metrics.file_sd:
        folder = Path(config.metrics.file_sd).absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            found.append(f"metrics.file_sd: {folder} is no directory that can be written to; make it first")
    return found


def _listen(address: str, port: int) -> list[str]:
    from shoal.deploy.monitoring.access import exposed
    from shoal.deploy.monitoring.metrics_server import listen

    try:
        listen(address, port).close()
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            if not exposed(address):
                return []  # the run takes a free one and says which
            return [f"metrics.port: {port} on {address} is in use; choose another, or metrics.port=0 for a free one"]
        return [f"metrics.address: cannot listen on {address}:{port}: {error}"]
    return []


def _sinks(config: Config) -> list[str]:
    if not config.log.sinks:
        return []
    from shoal.deploy.monitoring.sinks import check_sinks

    return check_sinks(config.log)


def _run_dir(config: Config, run_dir: Path) -> list[str]:
    try:
        if run_dir.is_symlink() and not run_dir.exists():
            return [f"run_dir: {run_dir} is a link to nothing: is the storage mounted that it should be on?"]
        if run_dir.exists() and not run_dir.is_dir():
            return [f"run_dir: {run_dir} is a file"]
        existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except (OSError, ValueError) as error:
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        return [f"run_dir: cannot write to {run_dir}: {why}; choose another run_dir"]
    return []


def _ray(config: Config) -> list[str]:
    """Whether Ray can start here; in a cluster it runs already."""
    if config.mode != "local":
        return []
    # As Ray builds the path of its longest socket.
    setting = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    folder = os.environ[setting] if setting else "/tmp"
    session = f"session_2000-01-01_00-00-00_000000_{os.getpid()}"
    socket_path = os.path.join(folder, "ray", session, "sockets", "plasma_store")
    if (excess := len(os.fsencode(socket_path)) - MOST_SOCKET_PATH_BYTES) > 0:
        return [
            f"mode: Ray cannot start with {setting}={folder}: the paths of its sockets would be {excess} bytes longer "
            f"than the {MOST_SOCKET_PATH_BYTES} that the system allows; set RAY_TMPDIR to a shorter path"
        ]
    return []


def _resume(config: Config, run_dir: Path) -> list[str]:
    from shoal.deploy.training.resume import check_origin
    from shoal.learner.checkpoint import CheckpointError, Checkpoints, find_saved

    try:
        newest = Checkpoints(run_dir / "checkpoints").latest()
        if config.resume == "never":
            held = f"resume: run_dir {run_dir} holds checkpoints; resume=auto continues them, or choose another run_dir"
            return [] if newest is None else [held]
        chosen = newest if config.resume == "auto" else find_saved(Path(config.resume))
        if chosen is None:
            return []
        check_origin(config, chosen)
    except (CheckpointError, OSError) as error:
        return [f"resume: {error}"]
    if newest is not None and newest.policy_version > chosen.policy_version:
        return [
            f"resume: {config.resume} has policy version {chosen.policy_version}, but run_dir {run_dir} already holds "
            f"version {newest.policy_version}, which would be taken for the newest; choose another run_dir"
        ]
    return []


def _callbacks(config: Config) -> list[str]:
    if not config.callbacks:
        return []
    from shoal.deploy.training.callbacks import check_callbacks

    return check_callbacks(config.callbacks)
