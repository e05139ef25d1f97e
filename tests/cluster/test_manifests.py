"""What `cnsdiff launch k8s` and kustomize render: valid, the same, and what the policies need."""

import copy
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models

from cnsdiff_dist.cli import main
from cnsdiff_dist.cluster import manifests
from cnsdiff_dist.cluster.manifests import Launch, render
from cnsdiff_dist.config import Config, load_config
from cnsdiff_dist.errors import UserError
from tests.support.kubelet import environment, labels
from tests.support.rendered import action, pod_spec

ROOT = Path(__file__).resolve().parents[2]


OVERLAYS = ROOT / "launch" / "k8s" / "overlays"


VERSIONS = ("1.31", "1.32", "1.33", "1.34", "1.35")


TYPES = {
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
}


def _launch(kind: str, gpus: bool, **values: Any) -> Launch:
    """The launch that the overlays describe."""
    sizes = {"ranks": 8, "cpus": 64, "memory_gib": 512} if gpus else {}
    values = {"nodes": 2, "namespace": "cnsdiff", **sizes, **values}
    return Launch(
        "cnsdiff-run", "registry.example/cnsdiff:0.1.0", "x: 1\n", kind, gpus=gpus, **values
    )


def _problems(tree: dict[str, Any]) -> list[str]:
    """What is wrong with an object, unknown fields included."""
    if custom := TYPES.get(tree["kind"]):
        try:
            back = custom.from_dict(copy.deepcopy(tree)).to_dict()
        except ValueError as error:
            return [str(error)]
        return _difference(tree, back, more=True)  # a typed model may add defaults
    found = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(tree, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{version}: {error}")
    return found


def _difference(one: Any, other: Any, where: str = "", more: bool = False) -> list[str]:
    """Where two trees differ; with ``more`` the mappings of the second may have further keys."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = one.keys() if more else one.keys() | other.keys()
        pairs = [(f"{where}.{key}", one.get(key), other.get(key)) for key in keys]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(f"{where}[{i}]", a, b) for i, (a, b) in enumerate(zip(one, other))]
    else:
        return [] if one == other else [f"{where}: {one!r}, {other!r}"]
    return [found for place, a, b in pairs for found in _difference(a, b, place, more)]


@pytest.mark.parametrize("gpus", [False, True])
@pytest.mark.parametrize("kind", manifests.KINDS)
def test_every_object_is_valid_and_strictly_so(kind: str, gpus: bool) -> None:
    full = _launch(
        kind,
        gpus,
        env={"AWS_REGION": "eu-1"},
        secrets=("store",),
        volumes={"/mnt": "claim"},
        identity={"eks.amazonaws.com/role-arn": "arn:x"},
        schedule="0 4 * * *",
    )
    for launch in (_launch(kind, gpus), full):
        for tree in render(launch):
            assert not _problems(tree), (tree["kind"], _problems(tree))


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("job", "Job.spec.template.spec"),
        ("jobset", "JobSet.spec.replicatedJobs.0.template.spec.template.spec"),
        ("jobset", "JobSet.spec.failurePolicy"),
        ("trainjob", "TrainJob.spec.trainer"),
        ("trainjob", "TrainingRuntime.spec.template.spec.replicatedJobs.0.template.spec"),
        ("nightly", "CronJob.spec.jobTemplate.spec"),
    ],
)
def test_the_validation_sees_an_unknown_field(kind: str, path: str) -> None:
    name, *steps = path.split(".")
    tree = next(tree for tree in render(_launch(kind, True)) if tree["kind"] == name)
    place: Any = tree
    for step in steps:
        place = place[int(step) if step.isdigit() else step]
    place["replicaz"] = 3
    assert _problems(tree)


def _plain(tree: Any) -> Any:
    """The tree with named things sorted and without empty mappings, neither of which matters."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items() if value != {}}
    if isinstance(tree, list):
        items = [_plain(item) for item in tree]
        named = all(isinstance(item, dict) and "name" in item for item in items)
        return sorted(items, key=lambda item: item["name"]) if named else items
    return tree


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, for its kustomize")
@pytest.mark.parametrize(
    ("overlay", "kind", "gpus"),
    [("cpu", "job", False), ("gpu", "job", True)]
    + [(kind, kind, True) for kind in ("jobset", "trainjob", "nightly")],
)
def test_kustomize_renders_the_same(overlay: str, kind: str, gpus: bool) -> None:
    command = ["kubectl", "kustomize", str(OVERLAYS / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    theirs = list(yaml.safe_load_all(done.stdout))
    assert all(not _problems(tree) for tree in theirs)
    _, pod = pod_spec(theirs)
    of = labels("first", 0, **{"jobset.sigs.k8s.io/jobset-name": "first"})
    known = environment(pod["containers"][0], of)
    assert not any("$(" in value for value in known.values()), known
    config = next(tree["data"]["config.yaml"] for tree in theirs if tree["kind"] == "ConfigMap")
    ours = render(Launch(**{**vars(_launch(kind, gpus)), "config": config}))

    def sorted_(trees: list[Any]) -> list[Any]:
        return sorted(
            (_plain(tree) for tree in trees), key=lambda t: (t["kind"], t["metadata"]["name"])
        )

    assert _difference(sorted_(theirs), sorted_(ours)) == []


def test_the_example_config_is_one(tmp_path: Path) -> None:
    tree = yaml.safe_load((ROOT / "launch/k8s/base/configmap.yaml").read_text())
    (tmp_path / "config.yaml").write_text(tree["data"]["config.yaml"])
    config = load_config(str(tmp_path / "config.yaml"), [])
    assert config.data.url == "s3://bucket/data"
    assert config.data.streams % (2 * 8) == 0  # the largest overlay's world


@pytest.mark.parametrize("kind", manifests.KINDS)
def test_what_selects_pods_finds_them(kind: str) -> None:
    trees = render(_launch(kind, True))
    job, pod = pod_spec(trees)
    index = {"batch.kubernetes.io/job-completion-index": "0"}
    labels = {**job["template"]["metadata"]["labels"], **index}
    selectors = [tree["spec"]["selector"] for tree in trees if tree["kind"] == "Service"]
    for tree in trees:
        if tree["kind"] == "PodDisruptionBudget":
            selectors.append(tree["spec"]["selector"]["matchLabels"])
        if tree["kind"] == "NetworkPolicy":
            selectors.append(tree["spec"]["podSelector"]["matchLabels"])
    assert len(selectors) == 4
    assert all(selector.items() <= labels.items() for selector in selectors), selectors
    accounts = [t["metadata"]["name"] for t in trees if t["kind"] == "ServiceAccount"]
    assert accounts == [pod["serviceAccountName"]]


@pytest.mark.parametrize("name", ["no", "null", "x" * 50])
def test_any_name_stays_a_name(name: str) -> None:
    launch = Launch(name, "i", "x: 1\n", kind="nightly", nodes=2)
    assert all(not _problems(tree) for tree in render(launch))
    with pytest.raises(UserError, match="at most 49 small letters"):
        Launch("x" * 50, "i", "x: 1\n", kind="nightly", nodes=11)


@pytest.mark.parametrize("gpus", [False, True])
@pytest.mark.parametrize("kind", manifests.KINDS)
def test_pods_are_confined_and_have_time_to_end(kind: str, gpus: bool) -> None:
    _, pod = pod_spec(render(_launch(kind, gpus, grace_seconds=40)))
    (node,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
    assert pod["automountServiceAccountToken"] is False
    assert node["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not any("hostPath" in volume or "secret" in volume for volume in pod["volumes"])
    shutdown = int(next(v["value"] for v in node["env"] if v["name"] == "SHUTDOWN_SECONDS"))
    assert 40 < shutdown < pod["terminationGracePeriodSeconds"]
    gpu = node["resources"]["limits"].get("nvidia.com/gpu")
    assert gpu == ("8" if gpus else None)


@pytest.mark.parametrize("kind", manifests.KINDS)
def test_exit_codes_decide_what_is_tried_again(kind: str) -> None:
    spec, pod = pod_spec(render(_launch(kind, True)))
    assert pod["restartPolicy"] == "Never"  # else there is no pod failure policy
    assert action(spec, 2) == "FailJob"
    assert action(spec, 75) == "Ignore"
    assert action(spec, 137, disrupted=True) == "Ignore"
    assert action(spec, 1) == action(spec, 137) == "Count"
    assert spec["backoffLimit"] > 0 and spec["activeDeadlineSeconds"] > 0


def _rendered(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main(["launch", "k8s", *words]) == 0
    return list(yaml.safe_load_all(capsys.readouterr().out))


def test_the_command_line_renders_a_run(
    capsys: pytest.CaptureFixture[str], dataset: str, tmp_path: Path
) -> None:
    where = ("data.url=s3://b/data", "run.dir=s3://b/run", "train.epochs=3", "run.grace_seconds=9")
    sizes = ("--users", "1e6", "--items", "1e5", "--edges", "1e7")
    trees = _rendered(
        capsys,
        "configs/demo.yaml",
        "--image",
        "i:1",
        "--nodes",
        "4",
        "--gpus-per-node",
        "2",
        "--name",
        "first",
        *sizes,
        *where,
    )
    job, pod = pod_spec(trees)
    node = pod["containers"][0]
    assert job["completions"] == job["parallelism"] == 4 and node["image"] == "i:1"
    assert int(node["resources"]["limits"]["memory"].removesuffix("Gi")) >= 2 * 8 + 16
    text = next(tree["data"]["config.yaml"] for tree in trees if tree["kind"] == "ConfigMap")
    (tmp_path / "config.yaml").write_text(text)
    config = load_config(str(tmp_path / "config.yaml"), [])
    assert config == load_config(str(ROOT / "configs/demo.yaml"), list(where))
    names = {(tree["kind"], tree["metadata"]["name"]) for tree in trees}
    assert {("Job", "first"), ("ConfigMap", "first-config"), ("Service", "cnsdiff")} <= names
    assert not any("cnsdiff-run" in json.dumps(tree) for tree in trees)
    assert isinstance(config, Config)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "pods do not see this machine's files"),
        (("data.url=s3://b/d",), "run.dir is not set"),
        (("data.url=s3://b/d", "run.dir=s3://key:word@b/r"), "credentials"),
        (("data.url=/d", "run.dir=/r", "--volume", "claim=/mnt"), "data.url=/d: pods do not"),
        (("data.url=s3://b/d", "run.dir=s3://b/r", "--nodes", "3"), "3 ranks does not divide"),
        (("data.url=s3://b/d", "run.dir=s3://b/r", "--env", "AWS_SECRET_ACCESS_KEY=x"), "--secret"),
        (("data.url=s3://b/d", "run.dir=s3://b/r", "--name", "A", "--memory", "1"), "--name A"),
        (("--kind", "nightly", "run.dir=s3://key:word@b/r"), "credentials"),
        (("data.url=s3://b/d", "run.dir=s3://b/r", "--env", "P=http://u:w@h"), "credentials"),
        (("data.url=s3://b/d", "run.dir=s3://b/r", "--env", "X_CONNECTION_STRING=x"), "--secret"),
        (("--kind", "nightly"), "--env LOGS=URL"),
        (("--kind", "nightly", "--env", "LOGS=s3://b/l"), "--env NIGHTLY=URL"),
        (("data.ulr=s3://b/d",), "did you mean data.url"),
    ],
)
def test_what_would_fail_on_the_cluster_is_refused_here(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "k8s", "configs/demo.yaml", "--image", "i", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


def test_a_plan_that_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    where = ["data.url=s3://b/d", "run.dir=s3://b/r", "model.dim=128"]
    sizes = ["--users", "2e9", "--items", "1e8", "--edges", "2e10"]
    words = ["launch", "k8s", "configs/demo.yaml", *where, "--image", "i", *sizes]
    assert main(words) == 2
    assert "memory of 1 x 1 h100; try --nodes" in capsys.readouterr().err
