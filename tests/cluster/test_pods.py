"""The pods of rendered manifests, run on two hosts with their own command and environment."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from cnsdiff_dist.cli import main
from tests.support.hosts import TwoHosts, why_not
from tests.support.kubelet import Mounts, Pod, environment, labels
from tests.support.launching import assert_same_training, launched, until, written_config
from tests.support.rendered import action, pod_spec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
]
_CLAIM = "/mnt/cnsdiff"


class Cluster:
    """Two nodes, a volume that both mount, and the pods of one rendered Job."""

    def __init__(self, folder: Path, volume: Path, trees: list[dict[str, Any]]) -> None:
        self.spec, self._pod = pod_spec(trees)
        named = [tree for tree in trees if tree["kind"] in ("Job", "CronJob")]
        self.name = named[0]["metadata"]["name"]
        self.hosts = TwoHosts(*[self._names(index) for index in (0, 1)])
        self._folder, self._volume, self._pods = folder, volume, 0
        self._configs = {
            tree["metadata"]["name"]: tree["data"] for tree in trees if tree["kind"] == "ConfigMap"
        }
        self._stack = ExitStack()

    def _names(self, index: int) -> list[str]:
        name = f"{self.name}-{index}"
        return [name, f"{name}.{self._pod['subdomain']}"]

    def __enter__(self) -> "Cluster":
        self._stack.callback(self.hosts.down)
        self.hosts.up()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def seen_from_the_second_host(self, address: str) -> str:
        """The answer to a GET; empty while nothing answers."""
        read = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=5).read())"
        command = [*self.hosts.inside(1), sys.executable, "-c", read, f"http://{address}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout

    def start(self, index: int) -> Pod:
        self._pods += 1
        mounts = Mounts(self._configs, {"claim": self._volume})
        folder = self._folder / f"pod-{self._pods}"
        pod = Pod(self._pod, self.name, index, self.hosts, folder, mounts, OMP_NUM_THREADS="1")
        self._stack.callback(pod.remove)
        return pod


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A folder that both nodes mount and that user 1000, which pods have, may write."""
    folder = tmp_path / "volume"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


@pytest.fixture
def rendered(
    dataset: str, tmp_path: Path, volume: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[dict[str, Any]]]:
    shutil.copytree(dataset, volume / "data")

    def render(*words: str, **train: Any) -> list[dict[str, Any]]:
        config = written_config(dataset, tmp_path, "first", **train)
        sizes = ("--nodes", "2", "--gpus-per-node", "2", "--device", "cpu", "--memory", "4")
        where = (f"data.url={_CLAIM}/data", f"run.dir={_CLAIM}/run")
        command = ["launch", "k8s", config, *where, "--image", "i", *sizes]
        assert main([*command, "--volume", f"claim={_CLAIM}", *words]) == 0
        return list(yaml.safe_load_all(capsys.readouterr().out))

    return render


def _one_box(dataset: str, folder: Path, **train: Any) -> Path:
    """The same training by four ranks of one box."""
    config = written_config(dataset, folder, "box", **train)
    with launched("train", config, PET_NPROC_PER_NODE="4") as box:
        assert box.wait(200) == 0
    return folder / "box"


@pytest.mark.timeout(900)
def test_the_pods_of_a_job_train_what_one_box_trains(
    dataset: str, tmp_path: Path, volume: Path, rendered: Callable[..., Any]
) -> None:
    box = _one_box(dataset, tmp_path)
    with Cluster(tmp_path, volume, rendered()) as cluster:
        second, first = cluster.start(1), cluster.start(0)
        code, said = first.ended()
        assert code == 0, said + second.log.read_text()
        assert second.ended()[0] == 0
    assert_same_training(box, volume / "run")
    assert (volume / "run" / "config.yaml").stat().st_uid == 1000
    lines = [json.loads(line) for line in said.splitlines()]
    assert any(line["message"].startswith("finished") for line in lines)
    assert all({"time", "level", "rank", "message"} <= line.keys() for line in lines)


@pytest.mark.timeout(900)
def test_a_preempted_pod_is_made_again_and_nothing_is_lost(
    dataset: str, tmp_path: Path, volume: Path, rendered: Callable[..., Any]
) -> None:
    box = _one_box(dataset, tmp_path, epochs=8, patience=1000)
    with Cluster(tmp_path, volume, rendered(epochs=8, patience=1000)) as cluster:
        first, second = cluster.start(0), cluster.start(1)
        until(lambda: any(volume.glob("run/checkpoints/*/commit.json")), first.process)
        address = f"{cluster.name}-0.cnsdiff"
        metrics = cluster.seen_from_the_second_host(f"{address}:9464/metrics")
        assert "cnsdiff_steps_total" in metrics
        assert cluster.seen_from_the_second_host(f"{address}:8080/ready")
        second.sigterm()
        code, said = second.ended()
        assert code == 75 and action(cluster.spec, code) == "Ignore", said
        assert first.process.poll() is None
        again = cluster.start(1)
        code, said = first.ended(300)
        assert code == 0 and "resumed from" in said, said + again.log.read_text()
    assert_same_training(box, volume / "run")


@pytest.mark.timeout(900)
def test_bad_input_ends_the_job_at_once(
    tmp_path: Path, volume: Path, rendered: Callable[..., Any]
) -> None:
    trees = rendered()
    (volume / "data" / "manifest.json").write_text("{}")
    with Cluster(tmp_path, volume, trees) as cluster:
        first, second = cluster.start(0), cluster.start(1)
        code, said = first.ended()
        assert code == 2 and action(cluster.spec, code) == "FailJob", said
        assert "manifest.json" in said and "Traceback" not in said
        code, said = second.ended()  # whichever was first to know; the Job ends both
        assert code in (2, 75), said


@pytest.mark.timeout(900)
def test_a_night_from_logs_to_embeddings(
    tmp_path: Path, volume: Path, rendered: Callable[..., Any]
) -> None:
    rows = [f"u{n * 7 % 311},i{n * n % 97},{n}" for n in range(9_000)]
    (volume / f"log-{datetime.now(UTC) - timedelta(days=1):%Y}.csv").write_text(
        "\n".join(["user,item,timestamp", *rows])
    )
    env = ["--env", f"LOGS={_CLAIM}/log-%Y.csv", "--env", f"NIGHTLY={_CLAIM}/nightly"]
    env += ["--env", "PREPARE=--shift temporal --duplicates drop"]
    with Cluster(tmp_path, volume, rendered("--kind", "nightly", *env)) as cluster:
        second, first = cluster.start(1), cluster.start(0)
        code, said = first.ended(300)
        assert code == 0, said + second.log.read_text()
        night = cluster.name
    found = volume / "nightly"
    assert (found / "data" / night / "manifest.json").exists()
    assert (found / "runs" / night / "evaluations" / "test_ood.json").exists()
    assert (found / "embeddings" / night / "_SUCCESS").exists()
    assert said.count("4 cpu ranks") == 1


def test_a_jobset_and_a_trainjob_find_their_first_pod(rendered: Callable[..., Any]) -> None:
    """Under the names that their controllers give to pods."""
    _, pod = pod_spec(rendered("--kind", "jobset"))
    of = labels("first-node-0", 1, **{"jobset.sigs.k8s.io/jobset-name": "first"})
    found = environment(pod["containers"][0], of)
    assert found["PET_MASTER_ADDR"] == "first-node-0-0.first"
    assert found["JOB_COMPLETION_INDEX"] == "1" and found["PET_NNODES"] == "2"
    _, pod = pod_spec(rendered("--kind", "trainjob"))
    names = [variable["name"] for variable in pod["containers"][0]["env"]]
    # Kubeflow sets these by name, in place of what is there.
    assert {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_MASTER_ADDR"} <= set(names)
