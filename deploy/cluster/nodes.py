"""The nodes of a cluster: what they have, and tasks that run once on each of them."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

log = logging.getLogger(__name__)

SAY_PENDING_SECONDS = 15.0
"""How often it is said which nodes are waited for."""
MOST_NAMED = 4
"""Nodes that one message names."""

Answer = TypeVar("Answer")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One living machine of the cluster."""

    node_id: str
    address: str
    is_here: bool
    """This process runs there."""
    is_draining: bool
    resources: Mapping[str, float]
    available: Mapping[str, float]
    labels: Mapping[str, str]

    @property
    def name(self) -> str:
        """Address and id, for messages: nodes may share an address."""
        return f"{self.address} ({self.node_id[:8]})"


def ask_nodes(
    task: Callable[..., Answer],
    asked: Mapping[Node, tuple[Any, ...]],
    what: str,
    seconds: float,
    failed: Callable[[RayError], Answer] | None = None,
) -> dict[Node, Answer | None]:
    """What ``task`` returns on each of the nodes, with the arguments for it; None where that takes longer.

    An error of Ray's is logged, and the answer None, or what ``failed`` makes of it. What takes longer is ended.
    """
    remote = ray.remote(num_cpus=0, max_retries=0)(task)
    calls = {}
    for node, arguments in asked.items():
        there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        calls[remote.options(scheduling_strategy=there).remote(*arguments)] = node
    began, pending = time.monotonic(), list(calls)
    while pending and (left := seconds - (time.monotonic() - began)) > 0:
        _, pending = ray.wait(pending, num_returns=len(pending), timeout=min(left, SAY_PENDING_SECONDS))
        if pending and left > SAY_PENDING_SECONDS:
            waited = time.monotonic() - began
            log.warning("waiting for %s %s, %.0f of %g s", named(calls[c] for c in pending), what, waited, seconds)
    answers: dict[Node, Answer | None] = dict.fromkeys(asked)
    for call, node in calls.items():
        if call in pending:
            ray.cancel(call, force=True)
            continue
        try:
            answers[node] = ray.get(call)
        except RayError as error:
            if failed is not None:
                answers[node] = failed(error)
            else:
                log.warning("node %s cannot be asked: %s", node.name, error)
    return answers


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Return whether a node of ``labels`` meets a Ray label selector: ``v``, ``!v``, ``in(a,b)`` or ``!in(a,b)``."""
    for name, condition in selector.items():
        negated = condition.startswith("!")
        wanted = condition.removeprefix("!")
        values = wanted[3:-1].split(",") if wanted.startswith("in(") and wanted.endswith(")") else [wanted]
        if (labels.get(name) in [value.strip() for value in values]) == negated:
            return False
    return True


def fits(node: Node, labels: Mapping[str, str], needs: Mapping[str, float]) -> bool:
    """Whether the node meets a label selector and has these resources, free or not."""
    return matches(node.labels, labels) and all(node.resources.get(name, 0.0) >= need for name, need in needs.items())


def named(nodes: Iterable[Node]) -> str:
    """The nodes in words, ``MOST_NAMED`` of them by name."""
    names = [node.name for node in nodes]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{'nodes' if len(names) > 1 else 'node'} {', '.join(names[:MOST_NAMED])}{more}"
