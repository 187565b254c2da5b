#!/usr/bin/env bash
# Installs a wheel of shoal into an empty environment, in an empty folder, and uses it as its users do: trains, evaluates,
# reports, exports; an environment, a memory and a loss of their own; and a policy that acts from its ONNX file alone.
# Called as: try_wheel.sh WHEEL [REQUIREMENT...], where requirements are installed first (torch's CPU build, say).
set -euo pipefail
wheel=$(realpath "${1:?usage: try_wheel.sh WHEEL [REQUIREMENT...]}")
shift
folder=$(mktemp -d /tmp/shoal-wheel-XXXX)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export HOME="$folder" RAY_USAGE_STATS_ENABLED=0 RAY_TMPDIR="$folder"

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}
run "${PYTHON:-python3}" -m venv venv
run venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" "$wheel[report,onnx,minari]"
PATH="$folder/venv/bin:$PATH"

run shoal train env.id=CartPole-v1 mode=inline total_env_steps=4000 metrics.port=-1 run_dir=inline
run shoal train env.id=CartPole-v1 mode=local total_env_steps=4000 metrics.port=0 run_dir=local
for run in inline local; do
    run shoal evaluate $run --episodes 16 --vs random
    run shoal report $run
    run shoal export $run --onnx $run.onnx
    run shoal export $run --minari cartpole/$run-v0 --episodes 16
done

cat > my_env.py <<'PYTHON'
import gymnasium
import numpy as np


class MyEnv(gymnasium.Env):
    """Shows a sign once, and asks for it ``delay`` steps later."""

    observation_space = gymnasium.spaces.Box(0, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, delay=4):
        self.delay = delay

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.sign, self.time = int(self.np_random.integers(2)), 0
        return self.observe(), {}

    def step(self, action):
        asked = self.time == self.delay
        self.time += 1
        return self.observe(), float(asked and action == self.sign), asked, False, {}

    def observe(self):
        shown = self.time == 0
        return np.array([shown and self.sign == 0, shown and self.sign == 1, self.time == self.delay], np.float32)


gymnasium.register("MyEnv-v0", entry_point=MyEnv, max_episode_steps=200)
PYTHON
cp venv/lib/python3*/site-packages/shoal/deploy/examples/own_{core,loss}.py .
cat > play.py <<'PYTHON'
import sys

import my_env
import numpy as np
import onnxruntime

assert "torch" not in sys.modules
session = onnxruntime.InferenceSession("own.onnx")
shapes = {one.name: one.shape for one in session.get_inputs()}
h, c = (np.zeros((shapes[name][0], 1, shapes[name][2]), np.float32) for name in "hc")
env, total = my_env.MyEnv(), 0.0
for seed in range(20):
    (obs, _), is_first, ended = env.reset(seed=seed), True, False
    while not ended:
        inputs = {"obs": obs[None], "is_first": np.array([is_first]), "h": h, "c": c}
        action, _, _, h, c = session.run(None, inputs)
        obs, reward, ended, _, _ = env.step(action[0])
        is_first, total = False, total + reward
print("return of 20 episodes from the ONNX file:", total)
PYTHON
run shoal train env.id=my_env:MyEnv-v0 total_env_steps=40000 metrics.port=-1 run_dir=own
run shoal evaluate own --episodes 100 --vs random
run shoal report own
run shoal export own --onnx own.onnx
run python play.py
run python own_core.py total_env_steps=3000 mode=inline metrics.port=-1 run_dir=core
run python own_loss.py total_env_steps=3000 mode=inline metrics.port=-1 run_dir=loss
run python -c "import shoal; print(shoal.load_policy('local').act([0.0, 0.1, 0.2, 0.3]))"
