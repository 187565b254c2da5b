"""The launch files as the tests read them: Kubernetes objects by name, pods by group, and every command in them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from shoal.deploy.cli import _parser
from shoal.deploy.settings.load import load_config
from shoal.deploy.settings.sections import Config

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
LAUNCH = DEPLOY / "launch"
KUBERAY = LAUNCH / "kuberay"
CLUSTER = LAUNCH / "ray" / "cluster.yaml"
SBATCH = LAUNCH / "slurm" / "train.sbatch"
DOCKERFILE = LAUNCH / "image" / "Dockerfile"
LAUNCHING = DEPLOY / "docs" / "launching.md"
MANIFESTS = sorted(KUBERAY.glob("*/[!k]*.yaml"))
KUSTOMIZATIONS = sorted(KUBERAY.glob("*/kustomization.yaml"))
FILES = [*MANIFESTS, *KUSTOMIZATIONS, CLUSTER, SBATCH, DOCKERFILE, LAUNCHING]
# Of the batch script, as SLURM would set them.
VARIABLES = {"ACTORS": "32", "HEAD_IP": "10.0.0.1", "RUN_DIR": "/home/me/runs/forage"}


class _Loader(yaml.SafeLoader):
    """No key twice: YAML would silently take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: a key stands twice in {keys}"
        return super().construct_mapping(node, deep)


def documents(file: Path) -> list[Any]:
    """The documents of a YAML file."""
    return list(yaml.load_all(file.read_text(encoding="utf-8"), _Loader))


def kustomization(folder: str) -> Any:
    """The kustomization.yaml of a folder of ``deploy/launch/kuberay``."""
    [found] = documents(KUBERAY / folder / "kustomization.yaml")
    return found


def raw_objects(folder: str) -> dict[tuple[str, str], Any]:
    """The objects of a folder's own files by kind and name, as they stand there."""
    files = [KUBERAY / folder / name for name in kustomization(folder)["resources"] if not name.startswith("..")]
    return {(o["kind"], o["metadata"]["name"]): o for file in files for o in documents(file)}


def look_up(value: Any, path: Sequence[str]) -> Any:
    """What lies at a path of keys and indices."""
    for key in path:
        value = value[int(key) if isinstance(value, list) else key]
    return value


def image(named: Mapping[str, str]) -> str:
    """What kustomize makes of an entry of ``images``."""
    return f"{named['newName']}@{named['digest']}" if "digest" in named else f"{named['newName']}:{named['newTag']}"


@functools.cache
def objects() -> dict[tuple[str, str], Any]:
    """Every Kubernetes object by kind and name, as ``kubectl apply -k`` makes it, without kubectl.

    Only what these kustomizations use is understood: images, JSON patches, and replacements.
    """
    found = raw_objects("shared")
    [cluster] = raw_objects("cluster").values()
    images = {i["name"]: image(i) for i in kustomization("cluster")["images"]}
    spec = cluster["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        container(group["template"])["image"] = images[container(group["template"])["image"]]
    [job] = raw_objects("job").values()
    source = copy.deepcopy(cluster)
    [patch] = kustomization("job")["patches"]
    for change in yaml.safe_load(patch["patch"]):
        *path, last = change["path"].strip("/").split("/")
        if change["op"] == "test":
            assert look_up(source, path)[last] == change["value"]
        else:
            assert change["op"] == "add" or last in look_up(source, path)
            look_up(source, path)[last] = change["value"]
    for replacement in kustomization("job")["replacements"]:
        value = look_up(source, replacement["source"]["fieldPath"].split("."))
        [target] = replacement["targets"]
        [field] = target["fieldPaths"]
        *path, last = field.split(".")
        look_up(job, path)[last] = copy.deepcopy(value)
    for one in (cluster, job):
        found[one["kind"], one["metadata"]["name"]] = one
    return found


@functools.cache
def specs() -> dict[str, Any]:
    """The RayClusterSpecs by the name of what has them."""
    clusters = {name: o["spec"] for (kind, name), o in objects().items() if kind == "RayCluster"}
    jobs = {name: o["spec"]["rayClusterSpec"] for (kind, name), o in objects().items() if kind == "RayJob"}
    assert clusters
    assert jobs
    return clusters | jobs


def groups(spec: Any) -> dict[str, Any]:
    """Worker groups by name."""
    return {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def pods(spec: Any) -> dict[str, Any]:
    """Pod templates by group, with the labels that KubeRay adds: those of the group."""
    found = copy.deepcopy({"head": spec["headGroupSpec"]} | groups(spec))
    for group in found.values():
        group["template"]["metadata"]["labels"] |= group.get("labels", {})
    return {name: group["template"] for name, group in found.items()}


def all_pods() -> Iterator[tuple[str, Any]]:
    """Every pod template of every file, those that submit jobs among them."""
    for (kind, name), o in objects().items():
        if kind == "RayJob":
            yield f"{name}/submitter", o["spec"]["submitterPodTemplate"]
    for owner, spec in specs().items():
        yield from ((f"{owner}/{name}", pod) for name, pod in pods(spec).items())


def container(pod: Any) -> Any:
    """Ray's: KubeRay takes the first."""
    return pod["spec"]["containers"][0]


def quantity(text: str | int) -> float:
    """Kubernetes' notation of numbers."""
    number, unit = re.fullmatch(r"(\d+)(m|[KMG]i)?", str(text)).groups()
    return int(number) * {None: 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}[unit]


def lines(file: Path) -> Iterator[str]:
    """Lines of shell: code spans and blocks, comments, the values of YAML; continued ones joined."""
    text = re.sub(r"\\\n[ \t#]*", " ", file.read_text(encoding="utf-8"))
    yield from re.findall(r"`([^`\n]+)`", text)
    if file.suffix == ".md":
        text = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    elif file.suffix == ".yaml":
        text = "\n".join(re.findall(r"^\s*#.*", text, re.MULTILINE))
        yield from (value for document in documents(file) for value in _strings(document))
    yield from (line.strip(" \t#") for line in text.splitlines())


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def commands(file: Path, program: str) -> Iterator[list[str]]:
    """Every call of a program, as words: at the start of a line, or behind what starts it."""
    for line in lines(file):
        for part in re.split(r"&&|\|\||;(?! exec)", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # prose with an apostrophe
                continue
            for at in range(len(words) - 1):
                starts = at == 0 or words[at - 1] in ("--", "exec", "learner")
                if starts and Path(words[at]).name == program and re.fullmatch(r"[a-z-]+", words[at + 1]):
                    yield words[at:]
                    break


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One `shoal train` of the files."""

    file: Path
    settings: tuple[str, ...]
    config: Config
    problems: tuple[str, ...]

    def setting(self, key: str) -> str:
        """The value of a setting that stands in the command once."""
        [value] = [value for name, _, value in (s.partition("=") for s in self.settings) if name == key]
        return value


@functools.cache
def runs() -> tuple[Run, ...]:
    """Every `shoal train`, read by the command line and the configuration as they are."""
    found = []
    for file in FILES:
        for words in commands(file, "shoal"):
            if words[1] == "train" and len(words) > 2:  # not its name in prose
                expanded = [re.sub(r"\$(\w+)", lambda match: VARIABLES[match[1]], word) for word in words[1:]]
                options = _parser().parse_args(expanded)
                settings = tuple(options.settings)
                config, problems = load_config(options.config, settings)
                found.append(Run(file, settings, config, tuple(problems)))
    return tuple(found)
