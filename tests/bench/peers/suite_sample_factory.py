"""Sample Factory's APPO on one environment, with its own network and settings. Run by ``shoal bench learn --peer`` in
an environment of its own."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from typing import Any

from sample_factory.cfg.arguments import parse_full_cfg, parse_sf_args
from sample_factory.enjoy import enjoy
from sample_factory.envs.env_utils import register_env
from sample_factory.train import run_rl
from suite_env import Asked, make, tell

NAME = "suite"
ASKED = "SHOAL_SUITE_ASKED"
RECORDED = "SHOAL_SUITE_RECORDED"


def make_env(name: str, cfg: Any, env_config: Any, render_mode: str | None = None) -> Any:
    """At module level and told by the environment, because the workers are spawned and unpickle it."""
    asked = Asked.of(os.environ[ASKED])
    # Without a place there are only the spaces to look at.
    directory = asked.directory if env_config is not None and RECORDED in os.environ else None
    return make(asked, wrapper=asked.settings.get("env_wrapper", {}), directory=directory)


def words(asked: Asked, directory: str, **more: Any) -> list[str]:
    """Its command line."""
    options = {
        "algo": "APPO",
        "env": NAME,
        "experiment": NAME,
        "device": "cpu",
        "train_dir": directory,
        "seed": asked.seed,
        "train_for_env_steps": asked.env_steps,
        "set_workers_cpu_affinity": False,
        "log_to_file": False,
        "experiment_summaries_interval": 10**6,
        **{name: value for name, value in asked.settings.items() if name != "env_wrapper"},
        **more,
    }
    found = []
    for name, value in options.items():
        found += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return found


def main() -> None:
    os.environ[ASKED] = sys.argv[2]
    asked = Asked.of(sys.argv[2])
    register_env(NAME, make_env)
    with tempfile.TemporaryDirectory() as directory:
        os.environ[RECORDED] = "1"
        argv = words(asked, directory)
        parser, _ = parse_sf_args(argv)
        if run_rl(parse_full_cfg(parser, argv)):
            raise SystemExit("the training failed")
        ended = time.time()
        del os.environ[RECORDED]
        means = []
        for greedy in (False, True):
            argv = words(
                asked,
                directory,
                eval_deterministic=greedy,
                no_render=True,
                max_num_episodes=asked.episodes,
                load_checkpoint_kind="latest",
            )
            parser, _ = parse_sf_args(argv, evaluation=True)
            means.append(float(enjoy(parse_full_cfg(parser, argv))[1]))
    tell(sampled=means[0], greedy=means[1], ended=ended)


if __name__ == "__main__":
    main()
