#!/usr/bin/env bash
# Makes .venv and installs shoal into it, editable. Called by the Makefile as: install.sh runtime|dev
# PYTHON names the interpreter (default: the first suitable one), TORCH the torch requirement (see torch_choice.py).
set -euo pipefail
cd "$(dirname "$0")/../../.."
what=${1:?usage: install.sh runtime|dev}
venv=.venv

say() { printf 'install: %s\n' "$*"; }
fail() {
    printf 'install: %s\n' "$@" >&2
    exit 1
}
# runs COMMAND...: one line before it, one after it with the seconds it took
step() {
    local label=$1 start=$SECONDS
    shift
    say "$label ..."
    "$@"
    say "    done in $((SECONDS - start)) s"
}
# is_python INTERPRETER LOWEST BELOW: whether it runs and LOWEST <= 3.x < BELOW
is_python() {
    "$1" -c "import sys; sys.exit(not (3, $2) <= sys.version_info[:2] < (3, $3))" >/dev/null 2>&1
}

find_python() {
    local candidate
    # 3.11 and 3.12 first: MettaGrid, the demo's environment, has no release for a newer Python.
    for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
        is_python "$candidate" 11 13 && echo "$candidate" && return
    done
    for candidate in ${PYTHON:-python3 python3.13 python3.14}; do
        is_python "$candidate" 11 99 && echo "$candidate" && return
    done
    for candidate in ${PYTHON:-python3}; do
        command -v "$candidate" >/dev/null ||
            fail "there is no '$candidate' on the PATH; shoal needs Python 3.11 or 3.12." \
                "Install one, or name it: make install PYTHON=/path/to/python3.12"
        fail "'$candidate' is $("$candidate" --version 2>&1 | head -n 1), but shoal needs Python 3.11 or 3.12." \
            "Install one, or name it: make install PYTHON=/path/to/python3.12"
    done
}

make_venv() {
    local python
    is_python $venv/bin/python 11 99 && $venv/bin/python -m pip --version >/dev/null 2>&1 && return
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments: its 'venv' module is not installed." \
            "On Debian and Ubuntu: apt install python3-venv"
    rm -rf $venv
    step "making $venv with $("$python" --version) ($(command -v "$python"))" "$python" -m venv $venv
}

pip_install() {
    # --no-compile: see precompile. Twice quiet: errors are shown, warnings about each index that lacks a package are not.
    $venv/bin/python -m pip install -qq --disable-pip-version-check --no-input --no-compile --prefer-binary "$@"
}

# Every actor is a process that imports torch and Ray. Where PYTHONDONTWRITEBYTECODE is set, as in many containers, each
# would compile them anew: 3 seconds of a core more. With all cores at once, which pip does not use.
precompile() {
    local site
    site=$($venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    env -u PYTHONDONTWRITEBYTECODE $venv/bin/python -m compileall -qq -j 0 "$site/torch" "$site/ray" || true
    env -u PYTHONDONTWRITEBYTECODE $venv/bin/python -c 'import shoal.actors.ray_actor, shoal.deploy.cluster.connect, shoal.deploy.training.run, shoal.envs.gym'
}

# The checkout as a folder named shoal, for tools that read imports without running them: mypy, pyright, editors.
link_source() {
    mkdir -p $venv/src
    ln -sfn ../.. $venv/src/shoal
}

upgrade_pip() {
    # A new pip resolves from metadata alone, without downloading wheels to look into them. The old one works as well.
    $venv/bin/python -c 'import pip, sys; sys.exit(int(pip.__version__.split(".")[0]) < 25)' ||
        pip_install --upgrade pip 2>/dev/null || say "    could not; going on with $($venv/bin/python -m pip --version)"
}

start=$SECONDS
make_venv
case $what in
runtime)
    step "bringing pip up to date" upgrade_pip
    torch=()
    choice=$($venv/bin/python deploy/launch/install/torch_choice.py)
    while IFS= read -r word; do [ -z "$word" ] || torch+=("$word"); done <<<"$choice"
    is_python $venv/bin/python 11 13 ||
        say "NOTE: MettaGrid needs Python 3.11 or 3.12, so the demo and mettagrid/... will not run in this environment"
    # One call, so that one resolver sees torch and everything that asks for it.
    step "installing shoal and its libraries (half a gigabyte, more with CUDA; a minute or so)" \
        pip_install ${torch[@]+"${torch[@]}"} --editable '.[mettagrid,report]'
    link_source
    step "compiling what every process imports" precompile
    ;;
dev)
    step "installing the developers' tools" pip_install --editable '.[mettagrid,report,tensorboard,wandb,trackio,docs,dev]'
    ;;
*) fail "unknown: $what" ;;
esac
say "$what is in $venv after $((SECONDS - start)) s"
