"""The fields of Kubernetes objects: those of KubeRay 1.7.0's CRDs and of Kubernetes that the launch files may use.

KubeRay's server would drop a field that it does not know, or refuse the object; both are found here, without a server.
Fields of features that are off by default (networkPolicy, tlsOptions, historyServerOptions) are left out.
"""

from __future__ import annotations

import re
from typing import Any

# One type a line. A field is a string; name# an integer or number, name? a boolean, name~ a quantity, name* anything;
# name:Type an object, name:[Type] a list of them, name:[] a list of strings, name:{} strings by name, name:{~}
# quantities by name.
TYPES = {
    "RayCluster": "apiVersion kind metadata:Meta spec:RayClusterSpec",
    "RayClusterSpec": "authOptions:Auth autoscalerOptions:Autoscaler enableInTreeAutoscaling? "
    "gcsFaultToleranceOptions* headGroupSpec:Head headServiceAnnotations:{} managedBy rayVersion suspend? "
    "upgradeStrategy* workerGroupSpecs:[Workers]",
    "Auth": "enableK8sTokenAuth? mode secretName",
    "Autoscaler": "args:[] command:[] env:[Env] envFrom* idleTimeoutSeconds# image imagePullPolicy "
    "resources:Resources securityContext:ContainerSecurity upscalingMode version volumeMounts:[Mount]",
    "Head": "enableIngress? headService* ingressOptions* labels:{} rayStartParams:{} resources:{} serviceType "
    "template:Pod",
    "Workers": "groupName idleTimeoutSeconds# labels:{} maxReplicas# minReplicas# numOfHosts# priority# "
    "rayStartParams:{} replicas# resources:{} scaleStrategy* template:Pod",
    "RayJob": "apiVersion kind metadata:Meta spec:RayJobSpec",
    "RayJobSpec": "activeDeadlineSeconds# backoffLimit# clusterSelector:{} deletionStrategy* entrypoint "
    "entrypointNumCpus# entrypointNumGpus# entrypointResources jobId managedBy metadata:{} preRunningDeadlineSeconds# "
    "rayClusterSpec:RayClusterSpec runtimeEnvYAML shutdownAfterJobFinishes? submissionMode submitterConfig:Submitter "
    "submitterPodTemplate:Pod suspend? ttlSecondsAfterFinished#",
    "Submitter": "backoffLimit#",
    "Meta": "annotations:{} labels:{} name namespace",
    "Pod": "metadata:Meta spec:PodSpec",
    "PodSpec": "affinity:Affinity automountServiceAccountToken? containers:[Container] enableServiceLinks? "
    "imagePullSecrets* initContainers:[Container] nodeSelector:{} priorityClassName restartPolicy runtimeClassName "
    "schedulerName securityContext:PodSecurity serviceAccountName terminationGracePeriodSeconds# "
    "tolerations:[Toleration] topologySpreadConstraints* volumes:[Volume]",
    "Container": "args:[] command:[] env:[Env] envFrom* image imagePullPolicy lifecycle:Lifecycle livenessProbe* name "
    "ports:[Port] readinessProbe* resources:Resources securityContext:ContainerSecurity startupProbe* "
    "volumeMounts:[Mount] workingDir",
    "Env": "name value valueFrom*",
    "Port": "containerPort# name protocol",
    "Resources": "limits:{~} requests:{~}",
    "Mount": "mountPath name readOnly? subPath",
    "Lifecycle": "postStart:Hook preStop:Hook",
    "Hook": "exec:Exec",
    "Exec": "command:[]",
    "ContainerSecurity": "allowPrivilegeEscalation? capabilities:Capabilities privileged? readOnlyRootFilesystem? "
    "runAsGroup# runAsNonRoot? runAsUser# seccompProfile:Seccomp",
    "Capabilities": "add:[] drop:[]",
    "Seccomp": "localhostProfile type",
    "PodSecurity": "fsGroup# fsGroupChangePolicy runAsGroup# runAsNonRoot? runAsUser# seccompProfile:Seccomp "
    "supplementalGroups* sysctls*",
    "Toleration": "effect key operator tolerationSeconds# value",
    "Affinity": "nodeAffinity:NodeAffinity podAffinity* podAntiAffinity*",
    "NodeAffinity": "preferredDuringSchedulingIgnoredDuringExecution:[Preferred] "
    "requiredDuringSchedulingIgnoredDuringExecution:Required",
    "Preferred": "preference:NodeTerm weight#",
    "Required": "nodeSelectorTerms:[NodeTerm]",
    "NodeTerm": "matchExpressions:[Expression]",
    "Expression": "key operator values:[]",
    "Volume": "configMap* emptyDir:EmptyDir name persistentVolumeClaim:Claim secret*",
    "EmptyDir": "medium sizeLimit~",
    "Claim": "claimName readOnly?",
    "PersistentVolumeClaim": "apiVersion kind metadata:Meta spec:ClaimSpec",
    "ClaimTemplate": "metadata:Meta spec:ClaimSpec",
    "Service": "apiVersion kind metadata:Meta spec:ServiceSpec",
    "ServiceSpec": "clusterIP ports:[ServicePort] selector:{} type",
    "ServicePort": "name port# protocol targetPort~",
    "StatefulSet": "apiVersion kind metadata:Meta spec:StatefulSetSpec",
    "StatefulSetSpec": "podManagementPolicy replicas# selector:Selector serviceName template:Pod updateStrategy* "
    "volumeClaimTemplates:[ClaimTemplate]",
    "ClaimSpec": "accessModes:[] resources:Resources storageClassName volumeMode",
    "NetworkPolicy": "apiVersion kind metadata:Meta spec:NetworkPolicySpec",
    "NetworkPolicySpec": "egress:[Egress] ingress:[Ingress] podSelector:Selector policyTypes:[]",
    "Ingress": "from:[Peer] ports:[PolicyPort]",
    "Egress": "ports:[PolicyPort] to:[Peer]",
    "Peer": "ipBlock* namespaceSelector:Selector podSelector:Selector",
    "PolicyPort": "endPort# port~ protocol",
    "PodDisruptionBudget": "apiVersion kind metadata:Meta spec:BudgetSpec",
    "BudgetSpec": "maxUnavailable~ minAvailable~ selector:Selector unhealthyPodEvictionPolicy",
    "Selector": "matchExpressions:[Expression] matchLabels:{}",
    "PodMonitor": "apiVersion kind metadata:Meta spec:PodMonitorSpec",
    "PodMonitorSpec": "attachMetadata* jobLabel namespaceSelector* podMetricsEndpoints:[Endpoint] podTargetLabels:[] "
    "sampleLimit# selector:Selector",
    "Endpoint": "honorLabels? interval metricRelabelings* params* path port relabelings* scheme scrapeTimeout",
}
VERSIONS = {
    "RayCluster": "ray.io/v1",
    "RayJob": "ray.io/v1",
    "PersistentVolumeClaim": "v1",
    "Service": "v1",
    "StatefulSet": "apps/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "PodDisruptionBudget": "policy/v1",
    "PodMonitor": "monitoring.coreos.com/v1",
}
_SCALARS: dict[str, tuple[type, ...]] = {"": (str,), "#": (int, float), "?": (bool,), "~": (int, str)}


def problems_of(value: Any) -> list[str]:
    """Unknown fields and wrong types of a Kubernetes object, each with its path."""
    kind = value.get("kind")
    if VERSIONS.get(kind) != value.get("apiVersion"):
        return [f"{kind}: no such kind in {value.get('apiVersion')}"]
    return _object(value, kind, kind)


def _object(value: Any, name: str, path: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{path}: {value!r} is no {name}"]
    fields = dict(re.fullmatch(r"(\w+)(.*)", field).groups() for field in TYPES[name].split())
    found = [f"{path}.{key}: {name} has no such field" for key in value if key not in fields]
    return found + [p for key in value if key in fields for p in _field(value[key], fields[key], f"{path}.{key}")]


def _field(value: Any, kind: str, path: str) -> list[str]:
    if kind == "*":
        return []
    if kind in _SCALARS:
        fits = isinstance(value, _SCALARS[kind]) and (kind == "?" or not isinstance(value, bool))
        return [] if fits else [f"{path}: {value!r} has the wrong type"]
    kind = kind.removeprefix(":")
    if kind.startswith("{"):
        if not isinstance(value, dict):
            return [f"{path}: {value!r} is no mapping"]
        return [p for key in value for p in _field(value[key], kind[1:-1], f"{path}.{key}")]
    if kind.startswith("["):
        if not isinstance(value, list):
            return [f"{path}: {value!r} is no list"]
        item = kind[1:-1]
        return [p for i, v in enumerate(value) for p in _field(v, f":{item}" if item else "", f"{path}[{i}]")]
    return _object(value, kind, path)
