"""``shoal.Config``: checked when it is made, with the words of the command line."""

from __future__ import annotations

import dataclasses
import functools
import pickle
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import shoal
import torch
from shoal import given
from shoal.actors.user_code import UserCode
from shoal.deploy.library.config import make_config
from shoal.deploy.placement.setups import make_worker_setup
from shoal.deploy.settings import sections
from shoal.deploy.settings.load import load_config, resolve, to_dict
from shoal.envs.registry import make_env_spec
from shoal.learner.optimizer import check_optimizer
from shoal.policy import kinds
from shoal.policy.cores import find_core


class Mine(gymnasium.Env[Any, Any]):
    """An environment that other processes do not find by its name: they do not import tests."""


class MyPolicy(shoal.FastPolicy):
    """Likewise a policy."""


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"learner.gamma": 2}, ["learner.gamma=2"]),
        ({"learner": {"gamma": 2}}, ["learner.gamma=2"]),
        ({"learner": {"gama": 0.9}, "sed": 1}, ["learner.gama=0.9", "sed=1"]),
        ({"env": {"num_envs": 60}}, ["env.num_envs=60"]),
        ({"env": 5}, ["env.id=5"]),
        ({"run_dir": 12}, ["run_dir=12"]),
        ({"policy": "fats"}, ["policy.kind=fats"]),
        ({"policy": {"kwargs": {"size": 3}}}, ["policy.kwargs={size: 3}"]),
        ({"callbacks": ["no name"]}, ["callbacks=[no name]"]),
        ({"learner.batch_size": 100}, ["learner.batch_size=100"]),
    ],
)
def test_problems_read_as_on_the_command_line(settings: dict[str, Any], arguments: list[str]) -> None:
    """Catches a second set of rules or of words."""
    with pytest.raises(shoal.ConfigError) as caught:
        shoal.Config(**settings)
    assert list(caught.value.problems) == load_config((), arguments)[1] != []


def build(value: int) -> tuple[type[gymnasium.Env[Any, Any]], type[shoal.FastPolicy]]:
    """Classes that differ by what a function makes them of."""

    class Env(Mine):
        number = value

    class Policy(MyPolicy):
        number = value

    return Env, Policy


def test_classes_that_one_function_made_are_told_apart() -> None:
    """Catches a configuration whose class is replaced by the one made after it, as all have one name."""
    made = [build(value) for value in range(3)]
    configs = [shoal.Config(env=env, policy={"kind": policy}) for env, policy in made]
    again = shoal.Config(env=made[1][0])
    assert [given.environments[config.env.id] for config in configs] == [env for env, _ in made]
    assert [given.policies[config.policy.kind] for config in configs] == [policy for _, policy in made]
    assert again.env.id == configs[1].env.id


@pytest.mark.parametrize("table", [{1: "left"}, {"a": [{2.5: "b"}]}, {None: 1}])
def test_keys_that_json_has_not_are_refused(table: Any) -> None:
    """Catches an environment that is trained with the key 1 and evaluated with the key "1"."""
    with pytest.raises(shoal.ConfigError, match=r"env.kwargs.table: expected plain data .* is no text"):
        shoal.Config(env={"id": Mine, "kwargs": {"table": table}})


def test_a_policy_kind_that_is_misspelt_gets_a_hint() -> None:
    """Catches a typing error that is taken for the name of somebody's class."""
    with pytest.raises(shoal.ConfigError, match=r"policy.kind: must be fast, component, .*did you mean fast\?"):
        shoal.Config(policy="fats")


def test_all_problems_come_at_once() -> None:
    """Catches the first problem hiding those found before the settings are plain data."""
    with pytest.raises(shoal.ConfigError) as caught:
        shoal.Config(env={"id": Mine, "kwargs": {"map": np.zeros(3)}}, seed=-1, **{"learner.gamma": 2})
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["env.kwargs.map", "seed", "learner.gamma"]
    assert "got ndarray" in caught.value.problems[0]


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"env": {"id": Mine, "kwargs": {"a": {1}}}}, "a function that makes the environment may hold anything"),
        ({"log": {"sinks": [{"name": "a:B", "kwargs": {"a": {1}}}]}}, "make it in the sink's open"),
        ({"callbacks": [{"name": "a:B", "kwargs": {"a": {1}}}]}, "make it where it is needed, of plain arguments"),
    ],
)
def test_advice_on_arguments_is_for_what_takes_them(settings: dict[str, Any], advice: str) -> None:
    """Catches a sink's argument that a function of the environment is to hold."""
    with pytest.raises(shoal.ConfigError) as caught:
        shoal.Config(**settings)
    [problem] = caught.value.problems
    assert problem.split("; ")[1].startswith(advice)


def sink_class(name: str = "Made") -> type[shoal.Sink]:
    """A class that has its name from nowhere else than here."""

    class Made(shoal.Sink):
        def write(self, line: Any) -> None:
            pass

    Made.__qualname__ = name
    return Made


def test_two_sinks_of_one_name_are_refused() -> None:
    """Catches two classes made by one function, of which the last gets the lines of both."""
    one, two, third = sink_class(), sink_class(), sink_class("Third")
    for sinks in ([one, two], [{"name": one}, third, {"name": two, "kwargs": {}}]):
        with pytest.raises(
            shoal.ConfigError, match=r"^log.sinks: 2 classes are called .*:Made; give each a __qualname"
        ):
            shoal.Config(log={"sinks": sinks})
    assert len(shoal.Config(log={"sinks": [one, {"name": one}, third]}).log.sinks) == 3
    for name in ("Made", "Third"):
        given.sinks.pop(f"{__name__}:{name}")


def test_arguments_of_wrappers_are_plain_data() -> None:
    """Catches a run that cannot write its configuration down."""
    wrapper = {"a:B": {"size": np.int64(3), "low": np.zeros(2)}}
    with pytest.raises(shoal.ConfigError, match=r"env.wrappers.a:B.low: expected plain data"):
        shoal.Config(env={"id": "CartPole-v1", "wrappers": [wrapper]})
    del wrapper["a:B"]["low"]
    assert shoal.Config(env={"id": "CartPole-v1", "wrappers": [wrapper]}).env.wrappers == [{"a:B": {"size": 3}}]


def test_sections_dotted_keys_and_short_forms_say_the_same() -> None:
    """Catches one way of writing that is left out, or that replaces the rest of its section."""
    made = shoal.Config(env={"id": "recall"}, learner={"gamma": 0.9}, **{"learner.epochs": 2, "env.num_envs": 8})
    assert (made.env.id, made.env.num_envs, made.learner.gamma, made.learner.epochs) == ("recall", 8, 0.9, 2)
    assert shoal.Config(env="recall") == shoal.Config(**{"env.id": "recall"}) == shoal.Config(env={"id": "recall"})
    assert shoal.Config(learner={"regularization": {"clip_overrides": {"lstm.weight_hh_l0": 2}}}).learner.regularization


def test_python_values_become_plain_data() -> None:
    """Catches numpy's numbers refused, and a path that YAML cannot write."""
    made = shoal.Config(seed=np.int64(3), run_dir=Path("runs/x"), learner={"gamma": np.float32(0.5)}, env="recall")
    assert (made.seed, made.run_dir, made.learner.gamma) == (3, "runs/x", 0.5)


def test_only_python_gets_a_free_port() -> None:
    """Catches two runs of one notebook that want the same port, or the command line on a port nobody knows."""
    assert shoal.Config().metrics.port == 0
    assert shoal.Config(metrics={"port": 9464}).metrics.port == 9464
    assert load_config((), ())[0].metrics.port == 9464


def test_layers_lie_over_each_other(tmp_path: Path) -> None:
    """Catches settings that take back those of other keys, or a file that is read after them."""
    (tmp_path / "a.yaml").write_text("learner: {gamma: 0.5, epochs: 3}\nenv: {id: recall}\n")
    made = make_config(tmp_path / "a.yaml", {"learner.gamma": 0.25}, {"learner": {"gamma": 0.125}})
    assert (made.learner.gamma, made.learner.epochs, made.env.id, made.metrics.port) == (0.125, 3, "recall", 0)
    base = shoal.Config(env="recall", learner={"epochs": 3}, metrics={"port": -1})
    changed = make_config(base, {"learner.gamma": 0.25})
    assert (changed.learner.epochs, changed.learner.gamma, changed.metrics.port) == (3, 0.25, -1)
    assert make_config("recall").env.id == "recall"


def test_a_configuration_is_an_ordinary_frozen_value() -> None:
    """Catches a configuration that other code of ours, or a process pool, cannot use."""
    made = shoal.Config(env="recall", policy={"kind": "component", "components": {"fc1": {"size": 64}}})
    assert isinstance(made, sections.Config)
    assert pickle.loads(pickle.dumps(made)) == made
    assert resolve(to_dict(made))[0].policy.components == made.policy.components
    changed = dataclasses.replace(made, seed=7)
    assert (type(changed), changed.seed, changed.policy) == (shoal.Config, 7, made.policy)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.seed = 3  # type: ignore[misc]


def test_settings_of_the_caller_stay_as_they_are() -> None:
    """Catches bad settings that are taken out of the caller's own mapping."""
    learner = {"gamma": 2, "epochs": 3}
    with pytest.raises(shoal.ConfigError):
        shoal.Config(learner=learner)
    assert learner == {"gamma": 2, "epochs": 3}


def test_classes_and_functions_get_names() -> None:
    """Catches an object that no process can be told of: a name that does not say where it is from, or two for one."""
    from gymnasium.envs.classic_control.cartpole import CartPoleEnv

    assert shoal.Config(env=CartPoleEnv).env.id == "gymnasium.envs.classic_control.cartpole:CartPoleEnv"
    assert "gymnasium.envs.classic_control.cartpole:CartPoleEnv" not in given.environments
    # A function is no name that a checkpoint may call.
    assert shoal.Config(env=gymnasium.make).env.id == "gymnasium.envs.registration:make"
    assert given.environments["gymnasium.envs.registration:make"] is gymnasium.make
    made = shoal.Config(env=Mine, policy=MyPolicy)
    assert made.env.id == f"{__name__}:Mine"
    assert made.policy.kind == f"{__name__}:MyPolicy"
    partial = functools.partial(Mine)
    assert shoal.Config(env=partial).env.id == f"{__name__}:partial(Mine)"
    assert given.environments[f"{__name__}:partial(Mine)"] is partial
    assert shoal.Config(env=functools.partial(Mine)).env.id == f"{__name__}:partial(Mine)#2"


def test_lambdas_are_told_apart() -> None:
    """Catches the environment of the last lambda trained in place of the first one's."""
    one, two = (lambda: Mine()), (lambda: Mine())
    names = [shoal.Config(env=make).env.id for make in (one, two, one)]
    assert names[0] == names[2] != names[1]
    assert [given.environments[name] for name in names] == [one, two, one]


def test_what_no_process_can_use_is_refused() -> None:
    """Catches a wrong class that fails only in an actor."""

    class NoEnvironment:
        pass

    with pytest.raises(shoal.ConfigError, match=r"env.id: expected a class of environments.*NoEnvironment"):
        shoal.Config(env=NoEnvironment)
    for made in (NoEnvironment(), 3.5 + 1j):
        with pytest.raises(shoal.ConfigError, match=r"^env.id: expected an environment's id, its class, or .*give the"):
            shoal.Config(env=made)
    with pytest.raises(shoal.ConfigError, match=r"policy.kind: expected a subclass of shoal.RecurrentPolicy"):
        shoal.Config(policy=NoEnvironment)
    with pytest.raises(shoal.ConfigError, match=r"policy.core: expected a subclass of shoal.Core, got .*NoEnvironment"):
        shoal.Config(core=NoEnvironment)


def test_user_code_arrives_under_its_name() -> None:
    """Catches a process that gets the setup and not what it names."""

    class Local(gymnasium.Env[Any, Any]):
        pass

    class LocalPolicy(shoal.FastPolicy):
        pass

    class LocalCore(shoal.Core):
        pass

    class LocalOptimizer(torch.optim.SGD):
        pass

    made = shoal.Config(env=Local, policy=LocalPolicy, core=LocalCore, learner={"optimizer": LocalOptimizer})
    # As the setup of every learner has it, which is all that another process is told.
    setup = make_worker_setup(made, make_env_spec("recall"), run_id="r")
    sent = pickle.dumps(setup.user_code)
    del given.environments[made.env.id], given.policies[made.policy.kind], given.cores[made.policy.core]
    del given.optimizers[made.learner.optimizer]
    arrived = pickle.loads(sent)
    assert check_optimizer(made.learner) == ""
    assert given.environments[made.env.id] is arrived.environments[made.env.id]
    assert kinds.find_policy(made.policy.kind).__qualname__ == LocalPolicy.__qualname__
    assert find_core(made.policy.core).__qualname__ == LocalCore.__qualname__
    assert pickle.loads(pickle.dumps(UserCode.of("recall", "fast"))) == UserCode()
