#!/usr/bin/env bash
# Installs a wheel of shoal into an empty environment, in an empty folder, and uses it as its users do: trains, evaluates,
# reports, exports. Called as: try_wheel.sh WHEEL [REQUIREMENT...], where requirements are installed first (torch's CPU
# build, say).
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
run python -c "import shoal; print(shoal.load_policy('local').act([0.0, 0.1, 0.2, 0.3]))"
