"""The packages of the user's that a run's processes import, by the setting that names them."""

from __future__ import annotations

import importlib.util

from shoal import given
from shoal.deploy.settings.sections import Config

OF_ENVIRONMENTS = ("pettingzoo:", "mettagrid:", "mettagrid/")
"""What an ``env.id`` may begin with before, or in place of, the user's own module."""


def named_packages(config: Config) -> dict[str, str]:
    """The setting by the top-level name of a package, for those that an import finds here.

    What was given as an object goes along as the object; callbacks and sinks run in this process only.
    """
    learner = config.learner
    given_here = {*given.policies, *given.cores, *given.losses, *given.optimizers, *given.schedules}
    names = [
        ("policy.kind", config.policy.kind),
        ("policy.core", config.policy.core),
        ("learner.loss", learner.loss),
        ("learner.optimizer", learner.optimizer),
        *((f"learner.schedules.{name}.kind", str(one.kind)) for name, one in learner.schedules.items()),
    ]
    env_id = config.env.id
    if env_id not in given.environments:
        for prefix in OF_ENVIRONMENTS:
            env_id = env_id.removeprefix(prefix)
        names.append(("env.id", env_id))
    names += [("env.wrappers", one if isinstance(one, str) else next(iter(one))) for one in config.env.wrappers]
    found: dict[str, str] = {}
    for setting, name in names:
        module, colon, _ = name.partition(":")
        package = module.partition(".")[0]
        goes_along = name in given_here or package == "__main__"
        if colon and package.isidentifier() and not goes_along and importlib.util.find_spec(package):
            found.setdefault(package, setting)
    return found
