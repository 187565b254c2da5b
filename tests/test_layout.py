"""The layout of a run: shares cover the work exactly, whatever the machine and the settings."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoal.deploy.placement.layout import Layout, LayoutError, Machine, choose_layout
from shoal.deploy.settings.load import load_config
from shoal.deploy.settings.sections import Config


def config_of(*arguments: str) -> Config:
    config, problems = load_config([], arguments)
    assert not problems
    return config


BIG_UPDATES = ("env.num_envs=64", "actor.unroll_length=64", "learner.minibatches=1")


def layout_of(*arguments: str, cores: int, accelerator: bool = False) -> Layout:
    return choose_layout(config_of(*arguments), Machine(cores=cores, accelerator=accelerator))


@pytest.mark.parametrize("cores", [2, 4, 16, 64])
def test_with_large_optimizer_steps_every_core_acts_and_learns(cores: int) -> None:
    """Catches cores that wait for each other though each has enough of every optimizer step."""
    layout = layout_of(*BIG_UPDATES, cores=cores)
    assert (layout.placement, layout.num_learners, layout.num_actors) == ("colocated", cores, cores)
    assert layout.batch_size == 64 * cores
    assert layout.share(cores - 1).batch_size == 64


def test_one_core_does_both_in_one_process() -> None:
    """Catches processes that take turns on one core."""
    layout = layout_of(cores=1)
    assert (layout.placement, layout.num_learners, layout.num_actors, layout.batch_size) == ("colocated", 1, 1, 32)


@pytest.mark.parametrize(
    ("arguments", "cores", "actors", "threads"),
    [
        ([*BIG_UPDATES, "actor.num_actors=3"], 4, 3, 1),  # processes that somebody asked for are made
        ([*BIG_UPDATES, "learner.num_threads=3"], 4, 2, 3),
        (["env.num_envs=64", "learner.batch_size=64"], 4, 2, 2),  # one unroll cannot be shared out
        (["env.vectorization=async"], 4, 2, 2),
        (["placement=disaggregated"], 2, 1, 1),
        (["learner.num_learners=1"], 2, 1, 1),
        ([*BIG_UPDATES, "learner.minibatches=8"], 2, 1, 1),  # 512 steps each in an optimizer step
        ([], 2, 1, 1),  # the defaults have small minibatches
        ([], 16, 8, 8),
    ],
)
def test_where_rollout_processes_feed_one_learner(arguments: list[str], cores: int, actors: int, threads: int) -> None:
    """Catches a choice that ignores what was asked for."""
    layout = layout_of(*arguments, cores=cores)
    assert (layout.placement, layout.num_learners) == ("disaggregated", 1)
    assert (layout.num_actors, layout.num_threads) == (actors, threads)


def test_an_accelerator_is_fed_by_all_cores_but_one() -> None:
    """Catches a batch too small for all actors to be under way within the lag: some would never be admitted."""
    layout = layout_of(cores=100, accelerator=True)
    assert (layout.placement, layout.num_actors) == ("disaggregated", 99)
    assert layout.batch_size * 2 >= 99 * 16


def test_several_learners_with_accelerators_are_each_fed() -> None:
    """Catches learners that act on CPUs while their GPUs wait, and shares that are no whole unrolls."""
    layout = layout_of("learner.num_learners=2", cores=9, accelerator=True)
    assert (layout.placement, layout.num_learners, layout.num_actors) == ("disaggregated", 2, 8)
    assert layout.share(1).actors == range(4, 8)
    assert layout.share(1).batch_size * 2 >= 4 * 16
    with pytest.raises(LayoutError, match="2 learners that act on CPUs would leave their accelerators idle"):
        layout_of("learner.num_learners=2", "placement=colocated", cores=4, accelerator=True)


def test_a_cluster_is_laid_out_by_its_room() -> None:
    """Catches actors counted by the cores of the learner's machine."""
    room = Machine(cores=4, accelerator=False, actor_places=12)
    layout = choose_layout(config_of("mode=cluster"), room)
    assert (layout.placement, layout.num_learners, layout.num_actors, layout.num_threads) == ("disaggregated", 1, 12, 4)
    layout = choose_layout(config_of("mode=cluster", "learner.num_learners=13"), room)
    assert (layout.placement, layout.num_learners, layout.num_actors) == ("colocated", 13, 13)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["learner.num_learners=3", "actor.num_actors=4"], "actor.num_actors: 4 must be a multiple of the 3 learners"),
        (
            ["learner.num_learners=2", "env.num_envs=32", "learner.batch_size=32"],
            "learner.batch_size: 32 segments must be a multiple of 2 learners x 32 slots",
        ),
        (
            ["learner.num_learners=2", "env.num_envs=8", "learner.batch_size=16", "learner.minibatches=16"],
            "learner.batch_size: each learner's 8 segments must be a multiple of learner.minibatches=16",
        ),
        (
            ["learner.num_learners=2", "placement=disaggregated", "actor.num_actors=3"],
            "actor.num_actors: 3 must be a multiple of learner.num_learners=2",
        ),
        (
            ["learner.num_learners=2", "placement=disaggregated", "env.num_envs=64", "learner.batch_size=64"],
            "learner.batch_size: 64 segments must be a multiple of 2 learners x 64 slots",
        ),
    ],
)
def test_numbers_that_do_not_divide_are_refused(arguments: list[str], message: str) -> None:
    """Catches a run that starts and waits for ever for a batch that cannot be made."""
    with pytest.raises(LayoutError, match=message):
        layout_of(*arguments, cores=4)


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "env.num_envs": st.sampled_from([8, 24, 64, 128]),
        "learner.batch_size": st.sampled_from([48, 64, 128, 192, 1024]),
        "learner.minibatches": st.sampled_from([1, 2, 8]),
        "learner.num_learners": st.integers(1, 6),
        "actor.num_actors": st.integers(1, 6),
        "actor.max_policy_lag": st.integers(0, 3),
        "placement": st.sampled_from(["auto", "colocated", "disaggregated"]),
    },
)


@given(SETTINGS, st.integers(1, 70), st.booleans())
def test_shares_cover_batch_and_actors_exactly(settings: dict[str, Any], cores: int, accelerator: bool) -> None:
    """Catches an actor that nobody runs, segments that nobody trains, and unrolls that no batch can hold."""
    config, problems = load_config([], [f"{name}={value}" for name, value in settings.items()])
    if problems:
        return
    try:
        layout = choose_layout(config, Machine(cores=cores, accelerator=accelerator))
    except LayoutError:
        return
    for name in ("num_learners", "num_actors", "batch_size"):
        section = config.actor if name == "num_actors" else config.learner
        if getattr(section, name) != "auto":
            assert getattr(layout, name) == getattr(section, name)
    shares = [layout.share(rank) for rank in range(layout.num_learners)]
    assert [actor for share in shares for actor in share.actors] == list(range(layout.num_actors))
    assert sum(share.batch_size for share in shares) == layout.batch_size
    assert layout.batch_size % config.learner.minibatches == 0
    assert layout.whole().batch_size == layout.batch_size
    for share in shares:
        if layout.placement == "colocated" or config.actor.max_policy_lag == 0:
            # In turns every actor makes the same number of unrolls.
            assert share.batch_size % (len(share.actors) * config.env.num_envs) == 0
        if layout.placement == "colocated":
            assert share.batch_size % config.learner.minibatches == 0
            assert share.num_shards == 1
    assert layout.whole().num_shards == sum(share.num_shards for share in shares)
    assert [share.first_shard for share in shares] == [rank * shares[0].num_shards for rank in range(len(shares))]


@pytest.mark.parametrize(("megabytes", "warned"), [(1, False), (10**9, True)])
def test_shared_memory_that_is_too_small_is_said(megabytes, warned, caplog):
    """Unrolls that go through a disk, and a log level that hides Ray's own word of it."""
    from shoal.deploy.cluster.ray_session import check_shared_memory

    check_shared_memory(megabytes * 2**20)
    assert ("--shm-size" in caplog.text) == warned
