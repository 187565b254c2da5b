"""The near future of a trajectory queue, played from measured durations: is an unroll that starts now in time?"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

_TIE = 1e-6
"""Part of an unroll's duration within which two events are called simultaneous: what rounding makes of equal ones."""


class UnderWay(NamedTuple):
    """Another actor's unroll that is under way. All times are seconds, from now on."""

    back_in: float
    first: bool
    """It is trained before the unroll in question if both are there."""
    usual: float
    """The duration of the actor's next ones."""


class _Arrival(NamedTuple):
    at: float
    first: bool
    """Of simultaneous ones, those that come later than the unroll in question are taken first: the others are trained
    before it all the same."""
    begun: float
    """Minus infinity for an unroll that is under way already."""
    usual: float


def in_time(
    *,
    duration: float,
    under_way: Sequence[UnderWay],
    idle: Sequence[float],
    delivered: int,
    per_batch: int,
    max_policy_lag: int,
    update_seconds: float,
    update_left: float | None,
) -> bool:
    """Whether an unroll that starts now is trained within ``max_policy_lag`` versions.

    Unrolls come back, and the learner takes a batch whenever it is free and there is one. Those that are delivered or
    under way already are trained before the one in question; of those that start later, all batches that are full
    before it is back. Idle actors start as places become free, of which there are (max_policy_lag + 1) batches in all.
    Which actor takes which place is not known, so the worst is assumed: those that are back first take the first
    places, and an unroll that found none takes the next place for as long as the quickest unroll, because the quickest
    actor may have left its place to this one.

    Args:
        duration: of the unroll in question, in seconds.
        idle: usual durations of the unrolls of actors that are idle now.
        delivered: trajectories that wait for their update.
        per_batch: unrolls of one update.
        update_seconds: usual duration of an update.
        update_left: seconds until the update under way ends; None where there is none.
    """
    tie = _TIE * duration
    arrivals = [_Arrival(unroll.back_in, unroll.first, -math.inf, unroll.usual) for unroll in under_way]
    here_first, here_later = delivered, 0
    updating = update_left is not None
    places = (max_policy_lag + 1 - updating) * per_batch - delivered - len(under_way) - 1
    free_since = [0.0] * places
    waiting: list[float] = []

    def start(begun: float, usual: float, takes: float) -> None:
        # Of two that start now and take as long, the one in question is back first.
        back = begun + takes
        if back < duration + (tie if begun > tie else -tie):
            heapq.heappush(arrivals, _Arrival(back, False, begun, usual))

    heapq.heapify(arrivals)
    quickest = min([*idle, *(unroll.usual for unroll in under_way)], default=0.0)
    for usual in idle:
        start(0.0, usual, usual)
    lag, now, published_at = int(updating), 0.0, update_left
    while True:
        if published_at is None and here_first + here_later >= per_batch:
            taken = min(per_batch, here_first)
            here_first -= taken
            here_later -= per_batch - taken
            lag += 1
            if lag > max_policy_lag:
                return False
            published_at = now + update_seconds
        next_arrival = arrivals[0].at if arrivals else math.inf
        next_version = math.inf if published_at is None else published_at
        now = min(next_arrival, next_version)
        if now > duration + tie:
            break
        if next_version <= next_arrival:
            published_at = None
            free_since += [now] * per_batch
            for usual in waiting:
                start(now, usual, quickest)
            waiting.clear()
            continue
        _, first, begun, usual = heapq.heappop(arrivals)
        if begun >= 0:
            # It needs a place that was free when it began, or that another one left to it that was back first but could
            # have begun later. Else it begins when there is a place.
            # The tie makes one that begins in the first free place find it, whatever the sums were rounded to.
            place = bisect.bisect_right(free_since, now - quickest + tie) - 1
            if place < 0:
                if free_since:
                    start(free_since[0], usual, quickest)
                else:
                    waiting.append(usual)
                continue
            del free_since[place]
        here_first += first
        here_later += not first
        start(now, usual, usual)
    here_first += sum(arrival.first for arrival in arrivals)
    return lag + here_first // per_batch <= max_policy_lag
