"""Panels of the dashboard, and the expressions that they show."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal


@dataclasses.dataclass(frozen=True, slots=True)
class Panel:
    """One panel: expressions by their legends, without the labels that select a run, and without {{policy}}."""

    title: str
    queries: Mapping[str, str]
    unit: str = "short"
    """One of Grafana's: short, none, sci, s, bytes, Bps, percentunit."""
    _: dataclasses.KW_ONLY
    kind: Literal["timeseries", "stat", "bargauge", "heatmap", "table"] = "timeseries"
    width: int = 8
    height: int = 8
    decimals: int | None = None
    log: bool = False
    stacked: bool = False
    share: bool = False
    """The axis goes from 0 to 1."""
    bad_above: float | None = None
    """Values from here on are red."""
    when_empty: str = ""
    """Text in place of the panel while there are no values, if that is the normal case."""
    note: str = ""
    """Advice to the reader; the help texts of the catalogue follow it."""


def rate(metric: str) -> str:
    """Return the rate per second, over an interval that follows the zoom."""
    return f"rate({metric}[$__rate_interval])"


def all_policies(expression: str) -> str:
    """Return the sum over the policies of a run, for what adds up: steps, and parts of the same time."""
    return f"sum without (policy) ({expression})"


def mean(histogram: str) -> str:
    """Return the mean of recent observations of a histogram."""
    return f"{rate(f'{histogram}_sum')} / ({rate(f'{histogram}_count')} > 0)"


def buckets(histogram: str) -> str:
    """Return the recent observations of a histogram by bucket, of the policy that the page's variable names.

    A heatmap shows one distribution. The variable is empty where there is one policy: its series have no such label.
    """
    return f'sum by (le) (increase({histogram}_bucket{{policy="$policy"}}[$__rate_interval]))'


def loss_terms(*names: str) -> dict[str, str]:
    """Return expressions for terms of ``shoal_loss``, by their names."""
    return {"{{term}}": f'shoal_loss{{term=~"{"|".join(names)}"}}'}
