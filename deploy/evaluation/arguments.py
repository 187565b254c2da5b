"""The arguments of ``shoal evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(evaluate: argparse.ArgumentParser) -> None:
    """Add them."""
    evaluate.add_argument("run", type=Path, metavar="RUN", help="a run directory, or one of its checkpoints")
    evaluate.add_argument("--episodes", type=int, default=512, help="episodes to play, one per agent (default 512)")
    evaluate.add_argument("--seed", type=int, default=1, help="seed of environments and actions (default 1)")
    evaluate.add_argument("--num-envs", type=int, help="slots stepped together (default: as trained)")
    evaluate.add_argument(
        "--max-episode-steps",
        type=int,
        default=10_000,
        metavar="N",
        help="cut episodes that have not ended after N steps, and say how many (default 10,000)",
    )
    evaluate.add_argument("--greedy", action="store_true", help="take the most probable action instead of sampling")
    evaluate.add_argument("--zero-memory", action="store_true", help="zero the memory's state before every step")
    evaluate.add_argument(
        "--memory-horizon",
        type=int,
        nargs="*",
        metavar="K",
        help="how far back does it remember? Compare with memories of the last K steps only (default 0 1 2 4 8 16 32 "
        "64), in the same environments with the same seeds; shoal report draws it",
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.add_argument(
        "--vs",
        action="append",
        default=[],
        metavar="OTHER",
        help="compare with OTHER in the same environments with the same seeds: another run or checkpoint, random, or "
        "this policy played in another way: greedy, sampled or zero-memory; repeatable",
    )
    evaluate.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="OTHER",
        help="play games against OTHER, which plays all agents but one, in every seat in turn: pool (every version of "
        "self-play's), a version of it by its number, another run or checkpoint, or random; repeatable",
    )
    evaluate.add_argument(
        "--processes",
        type=int,
        help="number of processes (default: as many as make it faster); results do not depend on it",
    )
    evaluate.add_argument(
        "--video", type=Path, metavar="DIR", help="also record videos of episodes, if the environment renders images"
    )
    evaluate.add_argument(
        "--replay",
        type=Path,
        metavar="DIR",
        help="also write episodes as replays for MettaScope, if the environment is MettaGrid",
    )
    evaluate.add_argument(
        "--recordings", type=int, default=1, metavar="N", help="number of episodes in --video and --replay (default 1)"
    )
    evaluate.add_argument(
        "--env",
        metavar="ID",
        help="play in another environment; features and actions are matched by name, in any order",
    )
    evaluate.add_argument(
        "--env-kwargs",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the environment, VALUE in JSON; repeatable",
    )
    evaluate.add_argument(
        "--env-options",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of env that differs from training, e.g. wrappers=[] or image_layout=none, VALUE in JSON; "
        "repeatable",
    )
    for kind, absent in (("feature", "the environment does not have it"), ("action", "it is never taken here")):
        evaluate.add_argument(
            f"--map-{kind}",
            action="append",
            metavar="ENV=TRAINED",
            help=f"read {kind} ENV of the environment as {kind} TRAINED of the policy; =TRAINED means that {absent}"
            + (", ENV= that the policy does not see it" if kind == "feature" else "")
            + "; repeatable",
        )
