"""A run as Kubernetes objects: the files of ``launch/k8s`` with the values of one run.

``launch/k8s`` is written for kustomize. Its ``base`` holds a Job and the objects beside it; a
component patches that Job or wraps it in another kind. This module reads the parts of kustomize
that these files use: patches, resources, and replacements, which copy the Job's spec into its
wrapper. So kustomize and `cnsdiff launch` render the same source.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cnsdiff_dist.errors import UserError

KINDS = ("job", "jobset", "trainjob", "nightly")
_FOLDERS = (
    Path(__file__).parents[2] / "launch" / "k8s",
    Path(sys.prefix) / "share" / "cnsdiff_dist" / "k8s",
)
_EXAMPLE_NAME = "cnsdiff-run"  # the run's name in the files
_LOCAL = "config.kubernetes.io/local-config"  # kustomize's mark of an object that is not applied
_EXTRA_GRACE_SECONDS = 5  # that torchrun waits for the ranks beyond their own grace period
# A pod's host name is JOB-INDEX. JOB is the run's name and the characters that the kind adds to it.
_LONGEST_HOST_NAME = 63
_ADDED_TO_NAME = {"job": 0, "jobset": len("-node-0"), "trainjob": len("-node-0"), "nightly": 11}

Tree = dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """One run on a cluster.

    Attributes:
        config: the text of its config.yaml.
        kind: one of ``KINDS``.
        namespace: "" for that of the caller's kubectl.
        nodes: the number of pods.
        ranks: of a pod.
        gpus: whether each rank has a GPU.
        cpus, memory_gib: of a pod.
        grace_seconds: ``run.grace_seconds`` of the config.
        env: environment variables of the pods.
        secrets: names of Secrets whose keys become environment variables.
        volumes: PersistentVolumeClaims by mount path.
        identity: annotations of the service account.
        schedule: of a ``nightly`` run, as cron writes it; "" for that of the file.

    Raises:
        UserError: Kubernetes does not take the name, or it is too long.
    """

    name: str
    image: str
    config: str
    kind: str = "job"
    namespace: str = ""
    nodes: int = 1
    ranks: int = 1
    gpus: bool = False
    cpus: int = 2
    memory_gib: int = 4
    grace_seconds: int = 25
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    volumes: Mapping[str, str] = field(default_factory=dict)
    identity: Mapping[str, str] = field(default_factory=dict)
    schedule: str = ""

    def __post_init__(self) -> None:
        longest = _LONGEST_HOST_NAME - _ADDED_TO_NAME[self.kind] - len(f"-{self.nodes - 1}")
        if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", self.name) or len(self.name) > longest:
            raise UserError(
                f"--name {self.name}: a run is named by at most {longest} small letters, "
                "digits and dashes, a letter first and no dash last"
            )


def render(launch: Launch) -> list[Tree]:
    """Return the objects to apply, in an order that Kubernetes accepts.

    Raises:
        UserError: the files of launch/k8s are not there.
    """
    wanted = {"gpu": launch.gpus, launch.kind: launch.kind != "job"}
    components = [f"components/{name}" for name, is_wanted in wanted.items() if is_wanted]
    parts = [_part(folder, launch) for folder in ["base", *components]]
    objects = [tree for part in parts for tree in part.resources]
    patches = [(patch["kind"], patch) for part in parts for patch in part.patches]
    for kind, patch in [*patches, *_patches_of_run(launch)]:
        for tree in _of_kind(objects, kind):
            _merge(tree, patch)
    for part in parts:
        _replace(objects, part.replacements)
    if launch.namespace:
        for tree in objects:
            tree["metadata"]["namespace"] = launch.namespace
    return [tree for tree in objects if _LOCAL not in tree["metadata"].get("annotations", {})]


@dataclass(frozen=True)
class _Part:
    """The base or a component: what its kustomization.yaml names."""

    resources: list[Tree]
    patches: list[Tree]
    replacements: list[Tree]


def _part(folder: str, launch: Launch) -> _Part:
    def documents(names: Iterable[str]) -> list[Tree]:
        return [tree for name in names for tree in _documents(f"{folder}/{name}", launch)]

    rules = _documents(f"{folder}/kustomization.yaml", launch)[0]
    return _Part(
        resources=documents(rules.get("resources", [])),
        patches=documents(patch["path"] for patch in rules.get("patches", [])),
        replacements=rules.get("replacements", []),
    )


def to_yaml(objects: list[Tree]) -> str:
    """Write the objects as YAML documents."""
    return "".join(
        "---\n" + yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=100) for tree in objects
    )


def _patches_of_run(launch: Launch) -> Iterator[tuple[str, Tree]]:
    """Yield the kinds of object that have values of the run, with these values as a patch."""
    nodes, template = launch.nodes, {"spec": _pod(launch)}
    yield "Job", {"spec": {"completions": nodes, "parallelism": nodes, "template": template}}
    yield "ConfigMap", {"data": {"config.yaml": launch.config}}
    yield "PodDisruptionBudget", {"spec": {"minAvailable": nodes - 1}}
    if launch.identity:
        yield "ServiceAccount", {"metadata": {"annotations": dict(launch.identity)}}
    yield "TrainingRuntime", {"spec": {"mlPolicy": {"numNodes": nodes}}}
    yield "TrainJob", {"spec": {"trainer": {"numNodes": nodes, "numProcPerNode": launch.ranks}}}
    if launch.schedule:
        yield "CronJob", {"spec": {"schedule": launch.schedule}}


def _pod(launch: Launch) -> Tree:
    shutdown = launch.grace_seconds + _EXTRA_GRACE_SECONDS
    node = _container(launch, shutdown)
    pod: Tree = {"terminationGracePeriodSeconds": 2 * shutdown, "containers": [node]}
    if launch.volumes:
        claims = [(f"claim-{index}", *item) for index, item in enumerate(launch.volumes.items())]
        node["volumeMounts"] = [{"name": name, "mountPath": path} for name, path, _ in claims]
        pod["volumes"] = [
            {"name": name, "persistentVolumeClaim": {"claimName": claim}}
            for name, _, claim in claims
        ]
    return pod


def _container(launch: Launch, shutdown: int) -> Tree:
    """Return the container of a node; torchrun gives its ranks ``shutdown`` seconds to end."""
    env = {
        "PET_NNODES": launch.nodes,
        "PET_NPROC_PER_NODE": launch.ranks,
        "SHUTDOWN_SECONDS": shutdown,
        **launch.env,
    }
    resources = {"cpu": str(launch.cpus), "memory": f"{launch.memory_gib}Gi"}
    if launch.gpus:
        resources["nvidia.com/gpu"] = str(launch.ranks)
    node: Tree = {
        "name": "node",
        "image": launch.image,
        "env": [{"name": name, "value": str(value)} for name, value in env.items()],
        "resources": {"requests": resources, "limits": dict(resources)},
    }
    if launch.secrets:
        node["envFrom"] = [{"secretRef": {"name": name}} for name in launch.secrets]
    return node


def _merge(tree: Tree, patch: Tree) -> None:
    """Apply a strategic merge patch in place.

    Mappings are merged key by key, lists of objects by the objects' names. Null removes a key.
    """
    for key, value in patch.items():
        old = tree.get(key)
        if value is None:
            tree.pop(key, None)
        elif isinstance(value, dict) and isinstance(old, dict):
            _merge(old, value)
        elif isinstance(old, list) and all(isinstance(item, dict) for item in [*old, *value]):
            for item in value:
                name = item.get("name")
                same = [other for other in old if name is not None and other.get("name") == name]
                if same:
                    _merge(same[0], item)
                else:
                    old.append(item)
        else:
            tree[key] = value


def _replace(objects: list[Tree], replacements: list[Tree]) -> None:
    """Apply kustomize's replacements: copy a field of one object into fields of others."""
    for rule in replacements:
        source = rule["source"]
        value = _of_kind(objects, source["kind"])[0][source["fieldPath"]]
        for target in rule["targets"]:
            for tree in _of_kind(objects, target["select"]["kind"]):
                for path in target["fieldPaths"]:
                    _set_field(tree, path.split("."), deepcopy(value))


def _set_field(tree: Any, path: list[str], value: Any) -> None:
    *above, last = path
    for key in above:
        tree = tree[int(key) if key.isdigit() else key]
    tree[last] = value


def _of_kind(objects: list[Tree], kind: str) -> list[Tree]:
    return [tree for tree in objects if tree["kind"] == kind]


def _documents(name: str, launch: Launch) -> list[Tree]:
    """Return the YAML documents of a file, with the run's name in place of the example's."""
    for folder in _FOLDERS:
        if (folder / name).exists():
            trees = yaml.safe_load_all((folder / name).read_text(encoding="utf-8"))
            return [_renamed(tree, launch.name) for tree in trees]
    raise UserError(f"launch/k8s/{name}: not there; run this from a checkout, or install it whole")


def _renamed(tree: Any, name: str) -> Any:
    if isinstance(tree, dict):
        return {key: _renamed(value, name) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_renamed(value, name) for value in tree]
    return tree.replace(_EXAMPLE_NAME, name) if isinstance(tree, str) else tree


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks instead of quoting them."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
