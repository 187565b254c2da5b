"""Says why an environment cannot be made."""

from __future__ import annotations

from shoal import given
from shoal.envs.raised import raised
from shoal.problems import problems_of

_SETTINGS = ("policies", "env.", "learner.")
"""How messages of ours begin that name their setting."""


def why_not_made(env_id: str, error: BaseException) -> list[str]:
    """The problems, each with the setting it comes from; ``error`` is what making it raised."""
    if isinstance(error, SystemExit):
        return [f"env.id: {env_id} {given.ends(error)}"]
    if isinstance(error, ValueError) and str(error):
        return [each if each.startswith(_SETTINGS) else f"env.id: {each}" for each in problems_of(error)]
    return [f"env.id: {env_id}: {raised(error)}"]
