"""A run as Kubernetes objects: the files of launch/k8s with one run's values in them.

``launch/k8s`` is written for kustomize: ``base`` has a Job and what goes with it, a component
patches that Job or wraps it in another kind. What is read of them here is what they need: patches
of the Job, resources, and replacements that copy the Job's spec into its wrapper. So both ways of
rendering have one source.
"""

import re
import sys
from collections.abc import Iterator, Mapping
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
_EXAMPLE = "cnsdiff-run"  # what the files call the run
_LOCAL = "config.kubernetes.io/local-config"  # kustomize's mark of what is not to be applied
_GRACE = 5  # seconds between the ranks' own grace and torchrun's
_LONGEST_HOST = 63  # JOB-INDEX, where JOB is the run's name and what a kind adds to it:
_ADDED = {"job": 0, "jobset": len("-node-0"), "trainjob": len("-node-0"), "nightly": 11}

Tree = dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """One run on a cluster; ``config`` is the text of its config.yaml, ``memory_gib`` of a pod.

    ``volumes`` are claims by mount path, ``secrets`` names of Secrets that become environment
    variables, ``identity`` annotations of the service account.
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
        longest = _LONGEST_HOST - _ADDED[self.kind] - len(f"-{self.nodes - 1}")
        if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", self.name) or len(self.name) > longest:
            raise UserError(
                f"--name {self.name}: a run is named by at most {longest} small letters, "
                "digits and dashes, a letter first and no dash last"
            )


def render(launch: Launch) -> list[Tree]:
    """The objects to apply, in an order that Kubernetes accepts.

    Raises:
        UserError: the files of launch/k8s are not there.
    """
    objects = [
        tree for name in _one("base/kustomization.yaml", launch)["resources"]
        for tree in _documents(f"base/{name}", launch)
    ]  # fmt: skip
    patches, copies = [], []
    wanted = {"gpu": launch.gpus, launch.kind: launch.kind != "job"}
    for component in (name for name, is_wanted in wanted.items() if is_wanted):
        folder = f"components/{component}"
        rules = _one(f"{folder}/kustomization.yaml", launch)
        patches += [_one(f"{folder}/{patch['path']}", launch) for patch in rules["patches"]]
        copies += rules.get("replacements", [])
        for name in rules.get("resources", []):
            objects += _documents(f"{folder}/{name}", launch)
    for kind, patch in [*((patch["kind"], patch) for patch in patches), *_patches(launch)]:
        for tree in _of_kind(objects, kind):
            _merge(tree, patch)
    _copy(objects, copies)
    if launch.namespace:
        for tree in objects:
            tree["metadata"]["namespace"] = launch.namespace
    return [tree for tree in objects if _LOCAL not in tree["metadata"].get("annotations", {})]


def to_yaml(objects: list[Tree]) -> str:
    return "".join(
        "---\n" + yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=100) for tree in objects
    )


def _patches(launch: Launch) -> Iterator[tuple[str, Tree]]:
    """What is this run's own, by kind."""
    nodes = launch.nodes
    yield (
        "Job",
        {"spec": {"completions": nodes, "parallelism": nodes, "template": {"spec": _pod(launch)}}},
    )
    yield "ConfigMap", {"data": {"config.yaml": launch.config}}
    yield "PodDisruptionBudget", {"spec": {"minAvailable": nodes - 1}}
    if launch.identity:
        yield "ServiceAccount", {"metadata": {"annotations": dict(launch.identity)}}
    yield "TrainingRuntime", {"spec": {"mlPolicy": {"numNodes": nodes}}}
    yield "TrainJob", {"spec": {"trainer": {"numNodes": nodes, "numProcPerNode": launch.ranks}}}
    if launch.schedule:
        yield "CronJob", {"spec": {"schedule": launch.schedule}}


def _pod(launch: Launch) -> Tree:
    shutdown = launch.grace_seconds + _GRACE
    env = {
        "PET_NNODES": launch.nodes, "PET_NPROC_PER_NODE": launch.ranks,
        "SHUTDOWN_SECONDS": shutdown, **launch.env,
    }  # fmt: skip
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
    pod: Tree = {"terminationGracePeriodSeconds": 2 * shutdown, "containers": [node]}
    if launch.volumes:
        claims = [(f"claim-{index}", *item) for index, item in enumerate(launch.volumes.items())]
        node["volumeMounts"] = [{"name": name, "mountPath": path} for name, path, _ in claims]
        pod["volumes"] = [
            {"name": name, "persistentVolumeClaim": {"claimName": claim}}
            for name, _, claim in claims
        ]
    return pod


def _merge(tree: Tree, patch: Tree) -> None:
    """A strategic merge: mappings key by key, null removes, lists of named things by name."""
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


def _copy(objects: list[Tree], replacements: list[Tree]) -> None:
    """kustomize's: a field of one object in the place of fields of others."""
    for rule in replacements:
        source = rule["source"]
        value = _of_kind(objects, source["kind"])[0][source["fieldPath"]]
        for target in rule["targets"]:
            for tree in _of_kind(objects, target["select"]["kind"]):
                for path in target["fieldPaths"]:
                    _set(tree, path.split("."), deepcopy(value))


def _set(tree: Any, path: list[str], value: Any) -> None:
    *above, last = path
    for part in above:
        tree = tree[int(part) if part.isdigit() else part]
    tree[last] = value


def _of_kind(objects: list[Tree], kind: str) -> list[Tree]:
    return [tree for tree in objects if tree["kind"] == kind]


def _one(name: str, launch: Launch) -> Tree:
    return _documents(name, launch)[0]


def _documents(name: str, launch: Launch) -> list[Tree]:
    """The YAML documents of a file, with this run's name in place of the example's."""
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
    return tree.replace(_EXAMPLE, name) if isinstance(tree, str) else tree


class _Dumper(yaml.SafeDumper):
    """Long texts as they read, not quoted."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
