"""The files that launch shoal on clusters (deploy/launch/), checked without a cluster."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from launch_files import (
    CLUSTER,
    DEPLOY,
    DOCKERFILE,
    FILES,
    KUBERAY,
    KUSTOMIZATIONS,
    LAUNCHING,
    MANIFESTS,
    ROOT,
    SBATCH,
    all_pods,
    commands,
    container,
    documents,
    groups,
    lines,
    objects,
    pods,
    quantity,
    runs,
    specs,
)
from shoal.deploy.cli import _parser
from shoal.deploy.settings.sections import Config

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
named = functools.partial(pytest.mark.parametrize, "file", ids=lambda file: str(file.relative_to(DEPLOY)))


@named([*MANIFESTS, *KUSTOMIZATIONS, CLUSTER])
def test_yaml_is_read_as_it_looks(file: Path) -> None:
    """Catches a syntax error, and a key that stands twice, of which the last would win."""
    assert all(isinstance(document, dict) for document in documents(file))


def test_ray_accepts_the_cluster_for_ray_up() -> None:
    """Catches a field that Ray's own schema refuses, and a head that is no node type."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    [config] = documents(CLUSTER)
    validate_config(prepare_config(copy.deepcopy(config)))
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert config["max_workers"] == sum(node.get("max_workers", 0) for node in types.values())
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}


def test_images_and_versions_agree() -> None:
    """Catches nodes with another Ray or shoal than the rest, a GPU without CUDA, CUDA without a GPU, and an image that
    nobody is told to build.
    """
    version = PROJECT["project"]["version"]
    images = {variant: f"registry.example.com/shoal:{version}-{variant}" for variant in ("cuda", "cpu")}
    for name, pod in all_pods():
        gpu = "nvidia.com/gpu" in container(pod)["resources"]["limits"]
        assert container(pod)["image"] == images["cuda" if gpu else "cpu"], name
        assert gpu == (name.split("/")[1] in ("learner", "peer")), name
    [config] = documents(CLUSTER)
    assert config["docker"]["image"] == images["cuda"]
    assert "worker_image" not in str(config)
    for file in (LAUNCHING, DOCKERFILE):
        built = {}
        for words in (words for words in commands(file, "docker") if words[1] == "build"):
            assert (ROOT / words[words.index("-f") + 1]) == DOCKERFILE
            arguments = [words[i + 1] for i, word in enumerate(words) if word == "--build-arg"]
            built[words[words.index("-t") + 1]] = next((a[8:] for a in arguments if a.startswith("VARIANT=")), "cpu")
        assert built == {image: variant for variant, image in images.items()}, file
    [ray] = re.findall(r"^ARG RAY_VERSION=(.+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert {spec["rayVersion"] for spec in specs().values()} == {ray}
    assert set(re.findall(r"ray\[default\]==([\d.]+)", LAUNCHING.read_text())) == {ray}
    [lowest] = [re.sub(r"ray>=", "", d) for d in PROJECT["project"]["dependencies"] if d.startswith("ray>=")]
    assert [int(part) for part in ray.split(".")] >= [int(part) for part in lowest.split(".")]


def test_a_cpu_build_of_torch_acts_for_a_cuda_build_and_another_release_does_not() -> None:
    """Catches rollout nodes with the CPU image that are refused, and nodes with another torch that are let in."""
    from shoal.deploy.cluster.connect import Cluster
    from shoal.deploy.cluster.nodes import Node
    from shoal.deploy.cluster.probe import probe

    here = probe()
    release = here.versions["torch"].partition("+")[0]
    node = Node("0" * 56, "10.0.0.7", False, False, {"CPU": 1.0}, {}, {})
    cluster = Cluster.__new__(Cluster)
    cluster.config = Config().cluster

    def refused_with(torch: str) -> list[str]:
        answer = here._replace(versions={**here.versions, "torch": torch})
        return cluster.mismatches({node: answer}, Config())

    assert [refused_with(release + build) for build in ("", "+cpu", "+cu130", "+rocm7.0")] == [[]] * 4
    for other in (f"{release}.1+cpu", f"1{release}", "1.13.0+cpu"):
        [problem] = refused_with(other)
        assert f"has torch {other} (here {here.versions['torch']})" in problem


def test_the_token_is_the_one_that_is_made() -> None:
    """Catches a cluster without authentication, and a secret of another name or key than the one people are told of."""
    secret = ["create", "secret", "generic"]
    made, of_redis = [words for words in commands(LAUNCHING, "kubectl") if words[1:4] == secret]
    assert of_redis[4] == "shoal-redis"  # test_kuberay.py
    assert re.match(r"--from-literal=auth_token=.", made[5])
    for spec in specs().values():
        assert spec["authOptions"] == {"mode": "token", "secretName": made[4]}
    assert f"get secret {made[4]} -o jsonpath='{{.data.auth_token}}'" in LAUNCHING.read_text()
    [config] = documents(CLUSTER)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/shoal/.ray/auth_token": "~/.ray/auth_token"}
    assert "export RAY_AUTH_MODE=token\n" in SBATCH.read_text()


def test_metrics_are_found_and_may_be_read() -> None:
    """Catches a monitor of a port that no pod has, a port that the policy closes, and a run that serves another one."""
    declared = {(p["name"], p["containerPort"]) for _, pod in all_pods() for p in container(pod).get("ports", ())}
    ports = dict(declared)
    assert len(ports) == len(declared), "a name has several numbers"
    for owner, spec in specs().items():
        here = {name: {p["name"] for p in container(pod)["ports"]} for name, pod in pods(spec).items()}
        assert {name for name in here if "shoal-metrics" in here[name]} == {"learner"}, owner
        assert all("metrics" in names for names in here.values()), owner
        # Declaring one port of the head takes the defaults of its service away.
        assert {"gcs-server", "dashboard"} <= here["head"], owner
    monitor, policy = objects()["PodMonitor", "shoal"]["spec"], objects()["NetworkPolicy", "shoal"]["spec"]
    read = {ports[endpoint["port"]] for endpoint in monitor["podMetricsEndpoints"]}
    assert ports["shoal-metrics"] in read
    assert read in [{port["port"] for port in rule.get("ports", ())} for rule in policy["ingress"]]
    [operator] = [r for r in policy["ingress"] if "kuberay-operator" in str(r["from"])]
    assert [port["port"] for port in operator["ports"]] == [ports["dashboard"]]
    for run in runs():
        assert (run.config.metrics.port, run.config.metrics.address) == (ports["shoal-metrics"], "0.0.0.0"), run.file
    text = LAUNCHING.read_text()
    assert all(str(ports[name]) in text for name in ("shoal-metrics", "metrics", "as-metrics", "dash-metrics"))


def test_actors_find_nodes() -> None:
    """Catches actors that ask for a label or for CPUs that no node will ever have, and wait for ever."""
    [config] = documents(CLUSTER)
    assert [run.file for run in runs()] == [KUBERAY / "job" / "rayjob.yaml", CLUSTER, SBATCH, LAUNCHING]
    for run in runs():
        assert run.setting("cluster.actor_labels.role") == "rollout", run.file
        for spec in specs().values():
            rollout = groups(spec)["rollout"]
            cores = quantity(container(rollout["template"])["resources"]["limits"]["cpu"])
            assert rollout["labels"] == {"role": "rollout"}
            assert run.config.actor.num_actors <= rollout["maxReplicas"] * cores, run.file
    assert {name: node.get("labels", {}) for name, node in config["available_node_types"].items()} == {
        "head": {},
        "learner": {"role": "learner"},
        "rollout": {"role": "rollout"},
    }
    assert {"role=rollout", "role=learner"} <= set(re.findall(r"\brole=\w+", SBATCH.read_text()))
    for spec in specs().values():
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        # The other autoscaler does not know labels.
        assert (spec["enableInTreeAutoscaling"], spec["autoscalerOptions"]["version"]) == (True, "v2")
        assert "labels" not in str([group["rayStartParams"] for group in spec["workerGroupSpecs"]])


def test_the_command_runs_on_the_learners_node() -> None:
    """Catches an entrypoint that Ray puts on the head, or that no node has room for."""
    job = objects()["RayJob", "shoal-forage"]["spec"]
    learner = container(groups(job["rayClusterSpec"])["learner"]["template"])["resources"]["limits"]
    assert 0 < job["entrypointNumGpus"] <= quantity(learner["nvidia.com/gpu"])
    assert 0 < job["entrypointNumCpus"] <= quantity(learner["cpu"])
    # Peers have GPUs as well, and no storage.
    asked = json.loads(job["entrypointResources"])
    for spec in specs().values():
        offered = {name: group.get("resources", {}) for name, group in groups(spec).items()}
        assert offered == {"learner": {name: str(amount) for name, amount in asked.items()}, "peer": {}, "rollout": {}}
    submitted = [words for file in (CLUSTER, LAUNCHING) for words in commands(file, "ray") if "submit" in words]
    assert len(submitted) == 2
    for words in submitted:
        assert int(words[words.index("--entrypoint-num-gpus") + 1]) == job["entrypointNumGpus"]
        assert int(words[words.index("--entrypoint-num-cpus") + 1]) == job["entrypointNumCpus"]
    for words in (words for words in submitted if "--entrypoint-resources" in words):
        assert json.loads(words[words.index("--entrypoint-resources") + 1]) == asked
    assert sum("--entrypoint-resources" in words for words in submitted) == 1, "`ray up` has no peers"


def test_runs_are_kept() -> None:
    """Catches a run that is written to a disk that goes with its node, and a retry that starts from nothing."""
    for owner, spec in specs().items():
        learner = groups(spec)["learner"]["template"]["spec"]
        [(name, claim)] = [
            (volume["name"], volume["persistentVolumeClaim"]["claimName"])
            for volume in learner["volumes"]
            if "persistentVolumeClaim" in volume
        ]
        assert ("PersistentVolumeClaim", claim) in objects(), owner
        [kept] = [m["mountPath"] for m in learner["containers"][0]["volumeMounts"] if m["name"] == name]
        for run in runs():
            assert run.config.resume == "auto", run.file
            assert run.config.run_dir.startswith("/home/me/runs/" if run.file == SBATCH else f"{kept}/"), run.file
    # Deleting a job or a cluster must not delete what it made.
    assert [file.name for file in MANIFESTS if "kind: PersistentVolumeClaim" in file.read_text()] == ["storage.yaml"]
    [config] = documents(CLUSTER)
    assert "--volume /mnt/runs:/runs" in config["docker"]["run_options"]
    assert any(re.search(r"sudo mount .* /mnt/runs$", command) for command in config["initialization_commands"])
    assert "$SLURM_SUBMIT_DIR/runs" in SBATCH.read_text()


def test_a_learner_has_time_to_save() -> None:
    """Catches a hook that signals nobody, itself or twice, and a kill before the checkpoint is written."""
    [wait] = re.findall(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", DOCKERFILE.read_text())
    assert f"up to {wait} seconds" in LAUNCHING.read_text()
    for spec in specs().values():
        learner, rollout = (groups(spec)[name]["template"] for name in ("learner", "rollout"))
        assert 60 <= int(wait) < learner["spec"]["terminationGracePeriodSeconds"]
        [drain] = [env["value"] for env in container(rollout)["env"] if env["name"].endswith("_DRAIN_TIMEOUT_S")]
        assert float(drain) < rollout["spec"]["terminationGracePeriodSeconds"] <= 30
        shell, option, script = container(learner)["lifecycle"]["preStop"]["exec"]["command"]
        assert subprocess.run([shell, "-n", option, script], timeout=30).returncode == 0
        assert script.count("pkill -TERM") == 1
        for pattern in re.findall(r"-f '([^']+)'", script):
            assert re.search(pattern, "/usr/local/bin/python /usr/local/bin/shoal train --config forage")
            assert not re.search(pattern, script)
    # Ray starts commands by a shell, which would be signalled as well, die first, and take the learner with it.
    assert objects()["RayJob", "shoal-forage"]["spec"]["entrypoint"].startswith("exec shoal train ")
    for file in (CLUSTER, LAUNCHING):
        for words in commands(file, "ray"):
            assert "submit" not in words or words[words.index("--") + 1 :][:3] == ["exec", "shoal", "train"]


@named(FILES)
def test_shoal_accepts_its_commands(file: Path) -> None:
    """Catches a renamed setting, option or shipped configuration that a launch file still has."""
    for words in commands(file, "shoal"):
        if words[1] != "train":
            _parser().parse_args(words[1:])
    for run in (run for run in runs() if run.file == file):
        assert run.problems == ()
        assert "mode=cluster" in run.settings
        # The shipped configurations are for minutes on one machine: one actor's batch, a time limit.
        assert (run.config.learner.batch_size, run.config.max_seconds) == ("auto", 0)
        assert run.config.actor.max_policy_lag > 0


@named(FILES)
def test_ray_has_the_commands_and_options(file: Path) -> None:
    """Catches an option that the installed Ray does not have, which would show on the cluster only."""
    from ray.scripts.scripts import cli
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

    for words in commands(file, "ray"):
        arguments, command = words[1:], cli
        while arguments and hasattr(command, "commands"):
            assert arguments[0] in command.commands, f"ray {' '.join(words[1:])}"
            command, arguments = command.commands[arguments[0]], arguments[1:]
        own = arguments[: arguments.index("--")] if "--" in arguments else arguments
        accepted = {option for parameter in command.params for option in parameter.opts}
        if words[1] == "symmetric-run" and own:
            started = curate_and_validate_ray_start_args(own)
            assert [word.partition("=")[0] for word in started] == ["--num-cpus", "--labels"]
            accepted |= {option for parameter in cli.commands["start"].params for option in parameter.opts}
        used = {word.partition("=")[0] for word in own if word.startswith("-")}
        assert used <= accepted, f"ray {' '.join(words[1:])}"
    submit = {option for parameter in cli.commands["job"].commands["submit"].params for option in parameter.opts}
    assert set(re.findall(r"--entrypoint-[\w-]+", file.read_text(encoding="utf-8"))) <= submit


def test_every_ray_command_was_looked_at() -> None:
    """Catches a test that finds no commands."""
    found = {" ".join(words[1:3]) if words[1] == "job" else words[1] for f in FILES for words in commands(f, "ray")}
    assert found == {
        *("symmetric-run", "get-auth-token", "up", "down", "dashboard", "start", "stop"),
        *("job submit", "job logs", "job stop"),
    }


def test_the_guide_names_what_there_is() -> None:
    """Catches a file, an object or a make target in the guide that is not there."""
    text = LAUNCHING.read_text(encoding="utf-8")
    paths = {word for line in lines(LAUNCHING) for word in line.split() if word.startswith("deploy/")}
    paths |= {*re.findall(r"`(deploy/launch/(?:kuberay|ray|slurm|image)/[\w.]+)`", text)}
    paths |= {f"deploy/docs/{path}" for path in re.findall(r"\]\(([^):]+)\)", text)}
    paths |= {*re.findall(r"tests/\w+\.py", text)}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    assert {str(file.relative_to(ROOT)) for file in (CLUSTER, SBATCH)} <= paths
    assert {str(file.parent.relative_to(ROOT)) for file in KUSTOMIZATIONS} <= paths
    assert {file.name for file in (*MANIFESTS, *KUSTOMIZATIONS)} <= set(re.findall(r"[`/](\w+\.yaml)`", text))
    for kind, name in re.findall(r"\b(job|rayjob|service)[ /](shoal-[\w-]+)", text):
        owner = ("RayCluster", name.removesuffix("-head-svc")) if kind == "service" else ("RayJob", name)
        assert owner in objects()
    assert f"`{objects()['PersistentVolumeClaim', 'shoal-runs']['metadata']['name']}`" in text
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make (\w+)`", text)) <= set(targets)
    programs = {re.split(r"[ =]", line)[0] for line in lines(LAUNCHING) if re.match(r"\S+ (\S+ )*deploy/", line)}
    assert programs <= {"docker", "kubectl", "ray", "sbatch", "ACTORS"}


def test_slurm_reads_its_options() -> None:
    """Catches a syntax error, an option that SLURM does not see, and a warning signal that nobody handles."""
    text = SBATCH.read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", SBATCH], timeout=30).returncode == 0
    assert text.startswith("#!")
    code = re.search(r"^[^#\n]", text, re.MULTILINE).start()
    assert text.rfind("\n#SBATCH") < code, "SLURM stops reading at the first command"
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.+))?$", text, re.MULTILINE))
    known = {"job-name", "nodes", "ntasks-per-node", "cpus-per-task", "exclusive", "time", "signal", "requeue"}
    assert set(options) == known | {"open-mode", "output"}
    assert options["ntasks-per-node"] == "1"
    receiver, name, seconds = re.fullmatch(r"(\w+):(\w+)@(\d+)", options["signal"]).groups()
    assert (receiver, f"trap save_and_requeue {name}\n" in text, int(seconds) >= 60) == ("B", True, True)


@pytest.mark.parametrize(("told", "status", "requeued"), [("USR1", 143, True), (None, 0, False), ("fail", 1, False)])
def test_the_batch_script(tmp_path: Path, told: str | None, status: int, requeued: bool) -> None:
    """Catches a learner that is not told that time is up, and a job that is queued again for another reason or not."""
    job = f"test-{os.getpid()}-{told}"
    stubs = {
        "srun": f'while [ "$1" != bash ]; do shift; done; echo $$ >"{tmp_path}/step"; SLURM_NODEID=0 exec "$@"',
        "ray": 'echo "$@" >>"$SLURM_SUBMIT_DIR/ray"; while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
        "shoal": f"""echo "$@" >"$SLURM_SUBMIT_DIR/shoal"
        trap 'touch "$SLURM_SUBMIT_DIR/saved"; exit 143' TERM
        touch "$SLURM_SUBMIT_DIR/started"
        [ "{told}" != fail ] || exit 1
        [ "{told}" = USR1 ] || exit 0
        while :; do sleep 0.05; done""",
        "scontrol": 'echo "$@" >"$SLURM_SUBMIT_DIR/scontrol"',
        "activate": "",
    }
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name, script in stubs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    slurm = {"SUBMIT_DIR": str(tmp_path), "JOB_ID": job, "JOB_NUM_NODES": "3", "CPUS_PER_TASK": "16"}
    environment = {
        **{f"SLURM_{name}": value for name, value in slurm.items()},
        "HOME": str(tmp_path),
        "HEAD_IP": "10.0.0.1",
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
    }
    script = subprocess.Popen(["bash", SBATCH], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        if told == "USR1":
            script.send_signal(signal.SIGUSR1)
        assert script.wait(timeout=60) == status
    finally:
        script.kill()
    assert (tmp_path / "saved").exists() == (told == "USR1")
    assert (tmp_path / "scontrol").exists() == requeued
    assert not requeued or (tmp_path / "scontrol").read_text() == f"requeue {job}\n"
    assert "--num-cpus=16 --labels=role=learner -- bash -c" in (tmp_path / "ray").read_text()
    assert "actor.num_actors=32 " in (tmp_path / "shoal").read_text()
    assert f"run_dir={tmp_path}/runs/forage" in (tmp_path / "shoal").read_text()
    assert not Path(f"/tmp/shoal-{job}").exists()


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line.strip().partition(" ") for line in re.sub(r"\\\n", " ", text).splitlines() if line]
    return [(word, rest.strip()) for word, _, rest in lines]


def test_the_image_is_made_of_what_there_is() -> None:
    """Catches a package that is not in the image, a source that is not there or ignored, and a word Docker rejects."""
    known = {"ARG", "CMD", "COPY", "ENV", "FROM", "RUN", "SHELL", "USER", "WORKDIR"}
    assert {word for word, _ in instructions()} == known
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    kept = {line[1:] for line in ignored if line.startswith("!")}
    copied = {source.rstrip("/") for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]}
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert {source.split("/")[0] for source in copied} == kept
    packages = {name.split(".")[1] for name in PROJECT["tool"]["setuptools"]["packages"] if "." in name}
    assert packages <= copied
    assert {"py.typed", *(path.name for path in ROOT.glob("*.py"))} <= copied
    assert {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]} <= copied
    # `ray up` asks the image for it.
    assert any(word == "ENV" and "HOME=/home/shoal" in rest for word, rest in instructions())
    assert [word for word, _ in instructions()].index("USER") > max(
        i for i, (word, _) in enumerate(instructions()) if word == "RUN"
    )


@pytest.mark.parametrize(
    ("variant", "torch", "expected"),
    [("cuda", "", "torch"), ("cuda", "2.13.0", "torch==2.13.0"), ("cpu", "2.13.0+cpu", "torch==2.13.0+cpu")],
)
def test_the_image_installs(tmp_path: Path, variant: str, torch: str, expected: str) -> None:
    """Catches a shell error in the step that installs, a file that is copied elsewhere than it is run from, a CPU build
    for the learner, developers' tools, a plain Ray.
    """
    step_index = next(i for i, (word, rest) in enumerate(instructions()) if word == "RUN" and "torch_choice.py" in rest)
    stage = max(i for i, (word, _) in enumerate(instructions()[:step_index]) if word == "FROM")
    for word, rest in instructions()[stage:step_index]:
        if word == "COPY":
            *names, place = rest.split()
            for name in names:
                (tmp_path / place).mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, tmp_path / place)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pip").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "bin" / "pip").chmod(0o755)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    [step] = [rest for word, rest in instructions() if word == "RUN" and "torch_choice.py" in rest]
    [shell] = [json.loads(rest) for word, rest in instructions() if word == "SHELL"]
    environment = {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "VARIANT": variant,
        "TORCH": torch,
        "RAY_VERSION": "2.60.0",
    }
    done = subprocess.run([*shell, step], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[0] == "install"
    assert words[-4:] == [expected, "--requirement", "requirements.txt", "ray[default]==2.60.0"]
    required = (tmp_path / "requirements.txt").read_text().splitlines()
    extra = PROJECT["project"]["optional-dependencies"]
    assert required == [*PROJECT["project"]["dependencies"], *extra["mettagrid"]]
    environment["VARIANT"] = "gpu"
    assert subprocess.run([*shell, step], cwd=tmp_path, env=environment, capture_output=True, timeout=60).returncode
