"""What the encoders of images cost: ``shoal bench encoders [--rounds N] [--image HEIGHT WIDTH CHANNELS] [--json]``.

Parameters, and times of ``residual`` relative to ``small``: of acting with 16 rows, and of the gradient (forward and
backward) of 16 rows x 8 steps. Seconds on the processor, one thread, both encoders once per round in turn in one
process: medians [lowest .. highest] over rounds. The network is the default one with six actions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, get_args

import torch
from shoal.policy import FastPolicy, ImageObservation
from shoal.policy.actions import Discrete
from shoal.policy.observation import SMALL, ImageEncoder
from torch import Tensor

ACTIONS = Discrete((tuple(f"a{i}" for i in range(6)),))
ROWS, STEPS = 16, 8


class Encoded:
    """The network with one of the encoders."""

    def __init__(self, encoder: ImageEncoder, height: int, width: int, channels: int) -> None:
        torch.manual_seed(0)
        self.policy = FastPolicy(ImageObservation(height, width, channels, encoder=encoder), ACTIONS)
        self.obs = torch.randint(0, 256, (STEPS, ROWS, height, width, channels), dtype=torch.uint8)
        self.is_first = torch.zeros(STEPS, ROWS, dtype=torch.bool)
        self.variants: dict[str, Callable[[], object]] = {"acting": self.act, "forward and backward": self.backward}

    def act(self) -> None:
        """One step of the rows, as an actor makes it."""
        with torch.inference_mode():
            self.policy.act(self.obs[0], range(ROWS), self.is_first[0])

    def backward(self) -> None:
        """The gradient of all weights from all steps of the rows."""
        output, _ = self.policy.unroll(self.obs, self.is_first)
        loss = output.logits.square().mean() + output.value.square().mean()
        torch.autograd.grad(loss, list(self.policy.parameters()))

    def sizes(self) -> dict[str, float]:
        """Weights, those in convolutions, and the megabytes that a row's encoder keeps for the backward pass."""
        named = list(self.policy.named_parameters())
        kept: dict[int, int] = {}
        weights = {parameter.untyped_storage().data_ptr() for _, parameter in named}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            features = self.policy.encode(self.obs[0])
        assert features.requires_grad  # alive until here, so that no address was used twice
        return {
            "parameters": sum(parameter.numel() for _, parameter in named),
            "in convolutions": sum(p.numel() for name, p in named if name.startswith(("cnn", "section"))),
            "MB for the backward pass of a row": sum(kept.values()) / ROWS / 1e6,
        }


def seconds(function: Callable[[], object]) -> float:
    """Processor seconds of a call, the fastest of three: the others share the processor with somebody."""
    times = []
    for _ in range(3):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--image", type=int, nargs=3, default=[84, 84, 4], metavar=("HEIGHT", "WIDTH", "CHANNELS"))
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    made = {encoder: Encoded(encoder, *options.image) for encoder in get_args(ImageEncoder)}
    results: dict[str, dict[str, Any]] = {encoder: dict(one.sizes()) for encoder, one in made.items()}
    for encoder, sizes in results.items():
        print(
            f"{encoder:<10}"
            + "; ".join(
                f"{what} {size:,}" if isinstance(size, int) else f"{what} {size:.2f}" for what, size in sizes.items()
            )
        )
    print(f"times of {SMALL}: median [lowest .. highest] of {options.rounds} rounds")
    for what in made[SMALL].variants:
        spent: dict[str, list[float]] = {encoder: [] for encoder in made}
        for one in made.values():
            one.variants[what]()
        for _ in range(options.rounds):
            for encoder, one in made.items():
                spent[encoder].append(seconds(one.variants[what]))
        for encoder in made:
            values = sorted(own / small for own, small in zip(spent[encoder], spent[SMALL], strict=True))
            results[encoder][what] = (statistics.median(values), values[0], values[-1])
            if encoder != SMALL:
                print("  {:<12}{:<24}{:6.2f} [{:.2f} .. {:.2f}]".format(encoder, what, *results[encoder][what]))
    if options.json:
        print(json.dumps({"bench": "encoders", "image": options.image, "rounds": options.rounds, "encoders": results}))


if __name__ == "__main__":
    main()
