"""The Kubernetes manifests (deploy/launch/kuberay/), checked without a cluster."""

from __future__ import annotations

import copy
import functools
import re
import shutil
import subprocess
from pathlib import Path

import launch_fields
import pytest
import yaml
from launch_files import (
    DEPLOY,
    DOCKERFILE,
    KUBERAY,
    KUSTOMIZATIONS,
    LAUNCHING,
    MANIFESTS,
    all_pods,
    container,
    documents,
    groups,
    image,
    kustomization,
    objects,
    pods,
    quantity,
    raw_objects,
    runs,
    specs,
)
from shoal.deploy.placement.layout import Machine, choose_layout
from shoal.deploy.settings.load import load_config
from shoal.deploy.settings.sections import Config

named = functools.partial(pytest.mark.parametrize, "file", ids=lambda file: str(file.relative_to(DEPLOY)))


@named(MANIFESTS)
def test_fields_are_those_of_kubernetes(file: Path) -> None:
    """Catches a misspelled field, which a server drops without a word, and a number where it wants a string."""
    assert [p for document in documents(file) for p in launch_fields.problems_of(document)] == []


def test_a_wrong_field_is_seen() -> None:
    """Catches a check that lets everything pass."""
    job = copy.deepcopy(objects()["RayJob", "shoal-forage"])
    job["spec"]["backoffLimits"] = 3
    job["spec"]["backoffLimit"] = "3"
    spec = job["spec"]["rayClusterSpec"]
    spec["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    container(groups(spec)["rollout"]["template"])["env"][0]["value"] = 15
    groups(spec)["learner"]["template"]["spec"]["terminationGracePeriod"] = 120
    spec["networkPolicy"] = {"mode": "DenyAll"}
    assert len(launch_fields.problems_of(job)) == 6
    assert launch_fields.problems_of({"apiVersion": "ray.io/v1alpha1", "kind": "RayCluster"})


KUBECTL = shutil.which("kubectl")


@pytest.mark.skipif(KUBECTL is None, reason="there is no kubectl: https://kubernetes.io/docs/tasks/tools")
def test_kustomize_makes_what_the_other_tests_read() -> None:
    """Catches a file that kustomize refuses, and a patch or replacement that it takes otherwise than these tests do."""
    built = {}
    for folder in ("shared", "cluster", "job"):
        done = subprocess.run([KUBECTL, "kustomize", KUBERAY / folder], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert not done.stderr, "what is deprecated"
        for one in yaml.safe_load_all(done.stdout):
            built[one["kind"], one["metadata"]["name"]] = one
    assert built == objects()


@pytest.mark.skipif(KUBECTL is None, reason="there is no kubectl: https://kubernetes.io/docs/tasks/tools")
def test_a_digest_pins_an_image_everywhere(tmp_path: Path) -> None:
    """Catches a digest that reaches the cluster and not the job, or that the tag stays beside."""
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    file = tmp_path / "kuberay" / "cluster" / "kustomization.yaml"
    digest = f"sha256:{'0123456789abcdef' * 4}"
    file.write_text(re.sub(r"newTag: [\w.-]+-cpu", f"digest: {digest}", file.read_text()))
    done = subprocess.run(
        [KUBECTL, "kustomize", tmp_path / "kuberay" / "job"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    [job] = [one for one in yaml.safe_load_all(done.stdout) if one["kind"] == "RayJob"]
    spec = job["spec"]["rayClusterSpec"]
    pinned = image({"newName": "registry.example.com/shoal", "digest": digest})
    assert container(spec["headGroupSpec"]["template"])["image"] == pinned
    assert container(job["spec"]["submitterPodTemplate"])["image"] == pinned
    found = {name: container(group["template"])["image"] for name, group in groups(spec).items()}
    assert found["rollout"] == pinned
    assert found["learner"] == found["peer"] != pinned


def test_every_manifest_is_applied_and_the_images_stand_in_one_place() -> None:
    """Catches a file that no kustomization names, and an image that is changed in one place and not in another."""
    named_files = {
        KUBERAY / file.parent.name / name
        for file in KUSTOMIZATIONS
        for name in kustomization(file.parent.name)["resources"]
    }
    assert named_files == {*MANIFESTS, *(KUBERAY / folder / ".." / "cluster" for folder in ("job", "returning"))}
    with_images = [file for file in KUBERAY.glob("*/*") if "registry." in file.read_text()]
    assert with_images == [KUBERAY / "cluster" / "kustomization.yaml"]
    placeholders = {image["name"] for image in kustomization("cluster")["images"]}
    [cluster] = raw_objects("cluster").values()
    raw = cluster["spec"]
    used = [container(group["template"])["image"] for group in (raw["headGroupSpec"], *raw["workerGroupSpecs"])]
    assert set(used) == placeholders


def test_the_job_has_the_other_cluster_with_its_first_nodes() -> None:
    """Catches a patch that hits another group, and a job that never starts as no node comes before its command."""
    found = copy.deepcopy(specs())
    replicas = {
        owner: {
            group["groupName"]: (group.pop("replicas"), group.pop("minReplicas")) for group in spec["workerGroupSpecs"]
        }
        for owner, spec in found.items()
    }
    assert replicas["shoal"] == {"learner": (0, 0), "peer": (0, 0), "rollout": (0, 0)}
    assert replicas["shoal-forage"] == {"learner": (1, 1), "peer": (0, 0), "rollout": (1, 1)}
    assert found["shoal"] == found["shoal-forage"]


def test_pods_are_not_judged_by_the_run() -> None:
    """Catches a probe of the run: KubeRay starts none before all pods are ready, and one without it would be killed."""
    for name, pod in all_pods():
        for one in pod["spec"]["containers"]:
            assert not {"livenessProbe", "readinessProbe", "startupProbe"} & set(one), name
    guide = (DEPLOY / "docs" / "monitoring.md").read_text(encoding="utf-8")
    [probes] = re.findall(r"^```yaml\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)
    found = yaml.safe_load(probes)
    port = Config().metrics.port
    paths = {name: (probe["httpGet"]["path"], probe["httpGet"]["port"]) for name, probe in found.items()}
    assert paths == {
        "livenessProbe": ("/healthz", port),
        "startupProbe": ("/healthz", port),
        "readinessProbe": ("/readyz", port),
    }


def test_selectors_find_their_pods() -> None:
    """Catches a policy, monitor or budget that selects nothing, so protects and reads nothing, or the wrong pods."""
    places = {"NetworkPolicy": "podSelector", "PodMonitor": "selector", "PodDisruptionBudget": "selector"}
    found = {}
    for (kind, name), o in objects().items():
        if kind in places:
            wanted = o["spec"][places[kind]]["matchLabels"].items()
            found[kind, name] = {
                pod for pod, template in all_pods() if wanted <= template["metadata"]["labels"].items()
            }
    everything = {name for name, _ in all_pods()}
    of_group = {
        group: {name for name in everything if name.endswith(f"/{group}")} for group in ("head", "learner", "rollout")
    }
    assert found == {
        ("NetworkPolicy", "shoal"): everything,
        ("NetworkPolicy", "shoal-rollout"): of_group["rollout"],
        ("PodMonitor", "shoal"): everything,
        ("PodDisruptionBudget", "shoal-head"): of_group["head"],
        ("PodDisruptionBudget", "shoal-learner"): of_group["learner"],
    }
    [role] = re.findall(r"get pod -l role=(\w+)", LAUNCHING.read_text())
    assert role == "learner"


def test_nodes_are_not_drained_under_a_run() -> None:
    """Catches a budget that leaves room for an eviction, or that Kubernetes does not take for pods of KubeRay."""
    for (kind, name), o in objects().items():
        if kind == "PodDisruptionBudget":
            assert "maxUnavailable" not in o["spec"], name
            assert o["spec"]["minAvailable"] > sum(
                group["maxReplicas"] for s in specs().values() for group in groups(s).values()
            )
            assert isinstance(o["spec"]["minAvailable"], int), "a share is not for pods of a controller without a scale"


def test_rollouts_reach_the_cluster_and_dns_alone() -> None:
    """Catches an environment that may ask any host's port 53, where tunnels listen, or that has no DNS."""
    _, dns = objects()["NetworkPolicy", "shoal-rollout"]["spec"]["egress"]
    assert dns == {
        "to": [
            {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
                "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
            }
        ],
        "ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}],
    }
    own, _ = objects()["NetworkPolicy", "shoal-rollout"]["spec"]["egress"]
    assert own == {"to": [{"podSelector": {"matchLabels": {"app": "shoal"}}}]}


def test_several_learners_find_their_nodes() -> None:
    """Catches peer learners that ask for a label or for GPUs that no node has, and a batch they cannot divide."""
    [settings] = re.findall(r"`(learner\.num_learners=\d+ [^`]*)`", LAUNCHING.read_text())
    for run in runs():
        if run.file.parent.parent == KUBERAY or run.file == LAUNCHING:
            config, problems = load_config((), (*run.settings, *settings.split(), "env.id=recall"))
            assert not problems
            for spec in specs().values():
                peers = groups(spec)["peer"]
                assert peers["labels"] == config.cluster.learner_labels
                assert config.learner.num_learners == peers["maxReplicas"] + 1
                gpus = container(peers["template"])["resources"]["limits"]["nvidia.com/gpu"]
                assert quantity(gpus) == 1, "a peer takes one GPU, and a node with two would take two"
            layout = choose_layout(config, Machine(cores=8, accelerator=True, actor_places=64))
            assert (layout.placement, layout.num_learners) == ("disaggregated", config.learner.num_learners)


@pytest.mark.parametrize("owner", ["shoal", "shoal-forage"])
def test_pods_have_room(owner: str) -> None:
    """Catches a volume that is not defined, and an object store that does not fit into /dev/shm or memory."""
    for name, pod in pods(specs()[owner]).items():
        main, volumes = container(pod), {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in main["volumeMounts"]}
        assert main["resources"]["requests"] == main["resources"]["limits"], name
        shared = mounts["/dev/shm"]["emptyDir"]
        group = specs()[owner]["headGroupSpec"] if name == "head" else groups(specs()[owner])[name]
        store = int(group["rayStartParams"]["object-store-memory"])
        assert shared["medium"] == "Memory"
        limit = quantity(main["resources"]["limits"]["memory"])
        assert store < quantity(shared["sizeLimit"]) <= limit / 2, name
        if name != "head":
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_a_head_that_returns_finds_its_redis() -> None:
    """Catches a Redis that nobody can reach, or everybody, one without its data on a volume, and a name or a password
    that stands in two places and differs."""
    found = raw_objects("returning")
    redis, service = found["StatefulSet", "shoal-redis"]["spec"], found["Service", "shoal-redis"]["spec"]
    pod = redis["template"]
    labels = pod["metadata"]["labels"]
    assert labels == redis["selector"]["matchLabels"] == service["selector"]
    # Neither the policies nor the monitor of the cluster's own pods are meant.
    assert labels["app"] != "shoal"
    [patch] = kustomization("returning")["patches"]
    assert patch["target"] == {"kind": "RayCluster", "name": "shoal"}
    [change] = yaml.safe_load(patch["patch"])
    assert (change["op"], change["path"]) == ("add", "/spec/gcsFaultToleranceOptions")
    [port] = service["ports"]
    assert change["value"]["redisAddress"] == f"shoal-redis:{port['port']}"
    main = container(pod)
    [password] = main["env"]
    assert change["value"]["redisPassword"]["valueFrom"] == password["valueFrom"]
    assert main["command"][-2:] == ["--requirepass", f"$({password['name']})"]
    secret = password["valueFrom"]["secretKeyRef"]
    made = re.findall(
        r"create secret generic (\S+) --from-literal=(\w+)=", (KUBERAY / "returning" / "kustomization.yaml").read_text()
    )
    assert made == [(secret["name"], secret["key"])]
    [claim] = redis["volumeClaimTemplates"]
    [mount] = main["volumeMounts"]
    assert (mount["name"], mount["mountPath"]) == (claim["metadata"]["name"], "/data")
    assert main["command"][1:5] == ["--dir", "/data", "--appendonly", "yes"]
    policy = found["NetworkPolicy", "shoal-redis"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    [entry] = policy["ingress"]
    [peer] = [one["podSelector"]["matchLabels"] for one in entry["from"]]
    wanted = peer.items()
    assert {name for name, p in all_pods() if wanted <= p["metadata"]["labels"].items()} == {
        f"{owner}/head" for owner in specs()
    }
    assert policy["egress"] == []
    security = pod["spec"]["securityContext"]
    assert security["runAsNonRoot"]
    assert security["fsGroup"] == security["runAsUser"]
    assert main["securityContext"] == LEAST
    assert main["resources"]["requests"] == main["resources"]["limits"]


@pytest.mark.skipif(KUBECTL is None, reason="there is no kubectl: https://kubernetes.io/docs/tasks/tools")
def test_the_cluster_whose_head_returns_is_the_other_one_with_a_redis() -> None:
    """Catches a patch that kustomize refuses, or that changes anything else."""
    done = subprocess.run([KUBECTL, "kustomize", KUBERAY / "returning"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    built = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(done.stdout)}
    spec = copy.deepcopy(built["RayCluster", "shoal"]["spec"])
    assert spec.pop("gcsFaultToleranceOptions")["redisAddress"] == "shoal-redis:6379"
    assert spec == objects()["RayCluster", "shoal"]["spec"]
    image_of = container(built["StatefulSet", "shoal-redis"]["spec"]["template"])["image"]
    assert image_of == image(kustomization("returning")["images"][0])
    assert launch_fields.problems_of(built["RayCluster", "shoal"]) == []


LEAST = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def test_pods_may_not_do_more_than_they_must() -> None:
    """Catches a container that runs as root, and a user whom the image does not have."""
    [user] = re.findall(r"^USER (\d+):\d+$", DOCKERFILE.read_text(), re.MULTILINE)
    assert f"useradd --uid {user} " in DOCKERFILE.read_text()
    for name, pod in all_pods():
        security = pod["spec"]["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"]) == (True, int(user)), name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        if not name.endswith("/head"):  # its autoscaler talks to the Kubernetes API
            assert pod["spec"]["automountServiceAccountToken"] is False, name
        for one in pod["spec"]["containers"]:
            assert one["securityContext"] == LEAST, name
    assert all(spec["autoscalerOptions"]["securityContext"] == LEAST for spec in specs().values())


def test_what_is_written_is_a_volume() -> None:
    """Catches a process that ends because the image's file system, which is read-only, has no place for its files."""
    [home] = re.findall(r"^ENV HOME=(\S+)", DOCKERFILE.read_text(), re.MULTILINE)
    for name, pod in all_pods():
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert pod["spec"]["securityContext"]["fsGroup"] == pod["spec"]["securityContext"]["runAsUser"], name
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container(pod)["volumeMounts"]}
        assert all(mounts[path]["emptyDir"] == {} for path in (home, "/tmp")), name
        assert {*mounts} - {home, "/tmp"} == {
            "submitter": set(),
            "learner": {"/dev/shm", "/runs"},
        }.get(name.split("/")[1], {"/dev/shm"}), name
    for spec in specs().values():
        head = spec["headGroupSpec"]["template"]["spec"]
        mounts = spec["autoscalerOptions"]["volumeMounts"]
        assert {mount["mountPath"] for mount in mounts} == {home, "/tmp"}
        assert {mount["name"] for mount in mounts} <= {volume["name"] for volume in head["volumes"]}
