"""Environments that change what belongs to the whole process, and print."""

from __future__ import annotations

import logging
import logging.config
import os
import random
import signal
import socket
import warnings
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

EVERY = (
    "dtype",
    "gradients",
    "threads",
    "directory",
    "filters",
    "signals",
    "hang_up",
    "device",
    "determinism",
    "numpy",
    "pipe",
    "umask",
    "timeout",
    "logging",
    "root",
    "loggers",
)

QUIET = logging.NullHandler()


class Rude(gymnasium.Env[np.ndarray, int]):
    """Changes ``what`` in ``when`` (``init``, ``reset`` or ``step``), and fails in later steps where it is not so."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, what: str = "", when: str = "init", lines: int = 0) -> None:
        self.what, self.lines, self.t, self.when = what, lines, 0, when
        self._maybe("init")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._maybe("reset")
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: int) -> Any:
        self.t += 1
        if self.t > 1:
            self._check()
        self._maybe("step")
        for line in range(self.lines):
            print("debug", line)
        # Needs gradients of its own, which inference mode would deny.
        if not self.what or self.what == "autograd":
            weight = torch.ones(2, requires_grad=True)
            (weight * 3).sum().backward()
            assert weight.grad is not None
        return np.zeros(2, np.float32), 1.0, False, self.t == 50, {}

    def _maybe(self, now: str) -> None:
        if now != self.when:
            return
        match self.what:
            case "dtype":
                torch.set_default_dtype(torch.float64)
            case "gradients":
                torch.set_grad_enabled(False)
            case "threads":
                torch.set_num_threads(3)
            case "directory":
                os.chdir("/")
            case "filters":
                warnings.simplefilter("ignore", ResourceWarning)
            case "signals":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            case "hang_up":
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
            case "device":
                torch.set_default_device("meta")
            case "determinism":
                torch.use_deterministic_algorithms(True, warn_only=True)
            case "numpy":
                np.seterr(all="raise")
            case "pipe":
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            case "umask":
                os.umask(0o177)
            case "timeout":
                socket.setdefaulttimeout(0.5)
            case "logging":
                logging.disable(logging.CRITICAL)
            case "root":
                logging.basicConfig(level=logging.ERROR, handlers=[QUIET], force=True)
            case "loggers":  # every one that is not named is disabled
                logging.config.dictConfig({"version": 1, "loggers": {"rude": {"level": "DEBUG"}}})

    def _check(self) -> None:
        match self.what:
            case "dtype":
                assert torch.zeros(1).dtype == torch.float64
            case "gradients":
                assert not torch.is_grad_enabled()
            case "threads":
                assert torch.get_num_threads() == 3
            case "directory":
                assert os.getcwd() == "/"
            case "filters":
                assert warnings.filters[0][2] is ResourceWarning
            case "signals":
                assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            case "hang_up":
                assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            case "device":
                assert torch.zeros(1).device.type == "meta"
            case "determinism":
                assert torch.is_deterministic_algorithms_warn_only_enabled()
            case "numpy":
                assert np.geterr()["under"] == "raise"
            case "pipe":
                assert signal.getsignal(signal.SIGPIPE) is signal.SIG_DFL
            case "umask":
                os.umask(found := os.umask(0o177))
                assert found == 0o177
            case "timeout":
                assert socket.getdefaulttimeout() == 0.5
            case "logging":
                assert logging.root.manager.disable == logging.CRITICAL
            case "root":
                assert (logging.root.handlers, logging.root.level) == ([QUIET], logging.ERROR)


class Wanders(Rude):
    """Changes the working directory to ``to`` in its step ``at``; where it ``fails`` then, no other one can be made."""

    is_lost = False

    def __init__(self, to: str = "/", at: int = 150, fails: bool = False) -> None:
        super().__init__(what="nothing")
        if Wanders.is_lost:
            raise RuntimeError("lost my way")
        self.to, self.at, self.fails, self.steps = to, at, fails, 0

    def step(self, action: int) -> Any:
        self.steps += 1
        if self.steps == self.at:
            os.chdir(self.to)
        if self.fails and self.steps > self.at:
            Wanders.is_lost = True
            raise RuntimeError("lost my way")
        return super().step(action)


class Seeds(Rude):
    """Seeds every random stream of the process in each step, where it ``seeds``."""

    def __init__(self, seeds: bool = True) -> None:
        super().__init__(what="nothing")
        self.seeds = seeds

    def step(self, action: int) -> Any:
        if self.seeds:
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002  (as environments do)
            torch.manual_seed(0)
        return super().step(action)


class Prints(Rude):
    """Prints on standard output in every way there is: ``print``, another process, and below Python."""

    def step(self, action: int) -> Any:
        print("{", flush=True)
        os.system("echo '{'")
        os.write(1, b"{\n")
        return super().step(action)


gymnasium.register("Prints-v0", Prints, kwargs={"what": "nothing"})
gymnasium.register("Rude-v0", Rude)
gymnasium.register("Seeds-v0", Seeds)
gymnasium.register("Wanders-v0", Wanders)


def parallel_env(**kwargs: Any) -> Any:
    """The same as a game of one agent."""
    from pettingzoo import ParallelEnv

    class RudeGame(ParallelEnv):  # type: ignore[misc, type-arg]
        possible_agents = ["a"]  # noqa: RUF012
        metadata = {"name": "rude"}  # noqa: RUF012

        def __init__(self) -> None:
            self.agents: list[str] = []
            self.env = Rude(**kwargs)

        def observation_space(self, agent: str) -> Any:
            return self.env.observation_space

        def action_space(self, agent: str) -> Any:
            return self.env.action_space

        def reset(self, seed: int | None = None, options: Any = None) -> Any:
            self.agents = ["a"]
            obs, info = self.env.reset(seed=seed)
            return {"a": obs}, {"a": info}

        def step(self, actions: dict[str, Any]) -> Any:
            answer = self.env.step(actions["a"])
            if answer[2] or answer[3]:
                self.agents = []
            return tuple({"a": part} for part in answer)

    return RudeGame()
