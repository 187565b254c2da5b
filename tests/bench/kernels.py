"""The gain of the kernels of an update and of acting: ``shoal bench kernels [--rounds N] [--json]``.

Ratios of seconds on the processor, one thread, every variant once per round in turn: medians [lowest .. highest] over
rounds. Each number is of the demo's sizes (``forage``) and of the default ones.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from limit import Bare
from shoal.deploy.placement.layout import Machine, choose_layout
from shoal.deploy.settings.load import load_config
from shoal.learner.device import DevicePath
from shoal.learner.device_choice import runs_bfloat16
from shoal.policy.convolution import convolve
from torch import Tensor, nn

SIZES = {
    "demo": (["forage"], []),
    "demo, whole batch": (["forage"], ["learner.minibatches=1"]),
    "default": (["original"], []),
}
RATES = (0.0, 0.01, 0.03, 0.1, 0.5, 1.0)
PRECISIONS = {"float32": False, **({"bfloat16": True} if runs_bfloat16("cpu") else {})}
BEST = list(PRECISIONS)[-1]
CPU = torch.device("cpu")
PLAIN = ("update, eager float32, no resets", "conv2d")
LIMIT = f"acting + update per step: eager float32 without resets / ours in {BEST} at 1% resets"

Variant = tuple[str, str]
"""(what, how)"""


def seconds(function: Callable[[], object], calls: int) -> float:
    """Processor seconds of a call, the fastest of ``calls``: the others share the processor with somebody."""
    times = []
    for _ in range(calls):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def conv2d(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The former ``convolve``: a convolution of a box with planes first."""
    if x.shape[-2:] == layer.kernel_size:
        return F.linear(x.flatten(1), layer.weight.flatten(1), layer.bias)[..., None, None]
    return F.conv2d(x.contiguous(), layer.weight, layer.bias, layer.stride)


class Kernels:
    """The variants of one configuration."""

    def __init__(self, files: list[str], settings: list[str]) -> None:
        config, problems = load_config(files, [*settings, "learner.device=cpu"])
        if problems:
            sys.exit("\n".join(problems))
        self.bare = Bare(config, choose_layout(config, Machine(cores=1, accelerator=False)))
        self.flags = self.bare.batch["is_first"]
        self.generator = torch.Generator().manual_seed(0)
        policy, batch = self.bare.learner.policy, self.bare.batch
        rows = batch["obs"].flatten(0, 1)[: batch["is_first"].numel() // config.learner.minibatches]
        self.rows, self.to_box = rows, policy.to_box
        self.layer, self.from_tokens = policy.cnn1, policy._from_tokens
        self.variants: dict[Variant, Callable[[], object]] = {
            ("acting", "now"): self.bare.inference,
            ("acting", "from the box"): functools.partial(self.from_the_box, self.bare.inference),
            ("acting", "with conv2d and the value"): self.act_as_before,
        }
        for name, bfloat16 in PRECISIONS.items():
            for how, function in (("from tokens", None), ("patches", convolve), ("conv2d", conv2d)):
                self.variants[f"first layer, {name}", how] = functools.partial(self.first_layer, function, bfloat16)
                if function is conv2d and not bfloat16:
                    self.variants[PLAIN] = self.update_as_before
            update = functools.partial(self.update, bfloat16, 0.0, False)
            self.variants[f"update, {name}, 0% resets", "ours"] = update
            self.variants[f"update, {name}, 0% resets", "from the box"] = functools.partial(self.from_the_box, update)
            for rate in RATES:
                for how in ("ours", "step loop") if not bfloat16 else ("ours",):
                    self.variants[f"update, {name}, {rate:.0%} resets", how] = functools.partial(
                        self.update, bfloat16, rate, how == "step loop"
                    )

    def first_layer(self, function: Callable[[nn.Conv2d, Tensor], Tensor] | None, bfloat16: bool) -> None:
        """Forward and the weights' gradient, with the box if there is one."""
        with DevicePath(CPU, bfloat16=bfloat16).autocast():
            if function is None:
                y = self.from_tokens(self.rows, self.layer)
            else:
                y = function(self.layer, self.to_box(self.rows))
        torch.autograd.grad(y, list(self.layer.parameters()), torch.ones_like(y))

    def from_the_box(self, function: Callable[[], object]) -> None:
        """As where numba is not installed."""
        with mock.patch("shoal.policy.token_convolution.available", return_value=False):
            function()

    def act_as_before(self) -> None:
        """The whole step, value and all, over conv2d."""
        policy = self.bare.worker.policy

        def with_value(core: Tensor) -> Tensor:
            policy.value_head(torch.tanh(policy.critic_1(core)))
            return type(policy).logits(policy, core)

        with mock.patch("shoal.policy.fast.convolve", conv2d), mock.patch.object(policy, "logits", with_value):
            self.from_the_box(self.bare.inference)

    def update_as_before(self) -> None:
        """Eager float32 over conv2d; without resets, which leaves open how they would be done."""
        with mock.patch("shoal.policy.fast.convolve", conv2d):
            self.from_the_box(lambda: self.update(False, 0.0, False))

    def steps(self, what: str) -> int:
        """Environment steps in one call of a variant."""
        return self.bare.slots if what == "acting" else self.bare.batch_steps

    def update(self, bfloat16: bool, rate: float, loop: bool) -> None:
        """One update of the recorded batch with resets drawn anew."""
        self.flags.copy_(torch.rand(self.flags.shape, generator=self.generator) < rate)
        self.bare.learner.path = DevicePath(CPU, bfloat16=bfloat16)
        # With these every plan is run as a loop over steps.
        always = {"LOOP_FROM": -1.0, "LOOP_ROWS": 0}
        with mock.patch.multiple("shoal.policy.lstm", **always) if loop else contextlib.nullcontext():
            self.bare.update()


def ratios(variants: list[Variant]) -> dict[str, tuple[list[Variant], list[Variant]]]:
    """The ratios by name: the variants whose seconds per environment step are added up above and below."""
    found = {}
    for what, how in variants:
        first = next(h for w, h in variants if w == what)
        if how != first:
            found[f"{what}: {how} / {first}"] = ([(what, how)], [(what, first)])
    for name in PRECISIONS:
        for rate in RATES[1:]:
            found[f"update, {name}: {rate:.0%} resets / none"] = (
                [(f"update, {name}, {rate:.0%} resets", "ours")],
                [(f"update, {name}, 0% resets", "ours")],
            )
    if BEST != "float32":
        found[f"update: {BEST} / float32"] = (
            [(f"update, {BEST}, 0% resets", "ours")],
            [("update, float32, 0% resets", "ours")],
        )
    found[LIMIT] = (
        [("acting", "with conv2d and the value"), PLAIN],
        [("acting", "now"), (f"update, {BEST}, 1% resets", "ours")],
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    options = parser.parse_args()
    results: dict[str, dict[str, tuple[float, float, float]]] = {}
    for size, (files, settings) in SIZES.items():
        kernels = Kernels(files, settings)
        measured: dict[Variant, list[float]] = {key: [] for key in kernels.variants}
        for _ in range(options.rounds):
            for key, function in kernels.variants.items():
                spent = seconds(function, 3 if key[0].startswith("update") else 10)
                measured[key].append(spent / kernels.steps(key[0]))
        results[size] = {}
        print(f"\n{size}: median [lowest .. highest] of {options.rounds} rounds")
        for what, (above, below) in ratios(list(kernels.variants)).items():
            rounds = range(options.rounds)
            values = sorted(sum(measured[k][i] for k in above) / sum(measured[k][i] for k in below) for i in rounds)
            results[size][what] = (statistics.median(values), values[0], values[-1])
            print("  {:<88} {:6.3f}  [{:.3f} .. {:.3f}]".format(what, *results[size][what]), flush=True)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[2])
    main()
