"""launch/slurm.sbatch as a job of a real SLURM with two nodes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.launching import assert_same_training, ended, launched, written_config
from tests.support.slurm import Job, Slurm, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
]
_SCRIPT = "launch/slurm.sbatch"
_TRAIN = {"epochs": 8, "patience": 1000}
_ENDLESS = {"epochs": 100_000, "patience": 100_000}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def calm(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one box with as many ranks."""
    folder = tmp_path_factory.mktemp("calm")
    with launched(
        "train", written_config(dataset, folder, "run", **_TRAIN), PET_NPROC_PER_NODE="2"
    ) as box:
        code, said = ended(box, 600)
    assert code == 0, said
    return folder / "run"


@contextmanager
def submitted(slurm: Slurm, config: str, *words: str, **environment: str) -> Iterator[Job]:
    """Submit a training with a rank on each of two nodes; ``words`` are more options of sbatch."""
    environment = {"OMP_NUM_THREADS": "1", "PET_NPROC_PER_NODE": "1", **environment}
    job = slurm.submit("--nodes=2", *words, _SCRIPT, "train", config, **environment)
    try:
        yield job
    finally:
        job.cancel()
        slurm.until_idle()


def _until_trained(job: Job, run: Path) -> None:
    job.until(lambda: any((run / "checkpoints").glob("step-*/commit.json")))


def test_two_nodes_train_what_one_box_trains(
    slurm: Slurm, dataset: str, tmp_path: Path, calm: Path
) -> None:
    with submitted(slurm, written_config(dataset, tmp_path, "run", **_TRAIN)) as job:
        assert job.ended() == ("COMPLETED", "0:0", 0), job.log()
    assert "2 cpu ranks" in job.log()
    assert_same_training(calm, tmp_path / "run")


def _asked_to_stop(slurm: Slurm, job: Job) -> None:
    job.cancel("--signal=USR1")
    job.until(lambda: "preempted: checkpointed at step" in job.log())


def _more_urgent(slurm: Slurm, job: Job) -> None:
    """SLURM sends SIGTERM and waits for GraceTime.

    Here it signals every process, so a rank gets a second SIGTERM through the launcher and may
    leave without a checkpoint of this step.
    """
    other = slurm.submit("--nodes=2", "--partition=urgent", "--wrap=true")
    assert other.ended()[0] == "COMPLETED"


def _launcher_killed(slurm: Slurm, job: Job) -> None:
    """The launcher of the other node waits for this one until SLURM_WAIT is over."""
    (launcher,) = slurm.processes(1, "cnsdiff_dist.distributed.launcher")
    launcher.kill()
    job.until(lambda: "ended with 137: back into the queue" in job.log())


def _node_lost(slurm: Slurm, job: Job) -> None:
    """SLURM itself requeues the job, which then waits for two nodes."""
    slurm.kill_node(1)
    job.until(lambda: job.seen()["Restarts"] == "1")
    assert "back into the queue" not in job.log()
    slurm.start_node(1)


@pytest.mark.parametrize("happens", [_asked_to_stop, _more_urgent, _launcher_killed, _node_lost])
def test_the_job_is_requeued_and_goes_on(
    happens: Callable[[Slurm, Job], None], slurm: Slurm, dataset: str, tmp_path: Path, calm: Path
) -> None:
    config = written_config(dataset, tmp_path, "run", **_TRAIN)
    with submitted(slurm, config) as job:
        _until_trained(job, tmp_path / "run")
        happens(slurm, job)
        assert job.ended() == ("COMPLETED", "0:0", 1), job.log()
    assert "resumed from" in job.log()
    assert_same_training(calm, tmp_path / "run")


def test_out_of_time(slurm: Slurm, dataset: str, tmp_path: Path) -> None:
    """SLURM looks only every 30 s whether a job is to be warned of its end."""
    config = written_config(dataset, tmp_path, "run", **_ENDLESS)
    with submitted(slurm, config, "--time=3") as job:
        job.until(lambda: job.seen()["Restarts"] == "1")
        assert "preempted: checkpointed at step" in job.log()
        job.until(lambda: "resumed from" in job.log())


@pytest.mark.parametrize("words", [["train"], ["train", "CONFIG", "train.bathc=64"], []])
def test_what_the_user_must_mend_is_not_requeued(
    words: list[str], slurm: Slurm, dataset: str, tmp_path: Path
) -> None:
    config = written_config(dataset, tmp_path, "run")
    words = [config if word == "CONFIG" else word for word in words]
    job = slurm.submit("--nodes=2", _SCRIPT, *words, OMP_NUM_THREADS="1", PET_NPROC_PER_NODE="1")
    assert job.ended() == ("FAILED", "2:0", 0), job.log()


def test_cancelled_is_not_requeued(slurm: Slurm, dataset: str, tmp_path: Path) -> None:
    with submitted(slurm, written_config(dataset, tmp_path, "run", **_ENDLESS)) as job:
        _until_trained(job, tmp_path / "run")
        job.cancel()
        assert job.ended()[::2] == ("CANCELLED", 0)
        slurm.until_idle()
        assert [slurm.processes(index, "cnsdiff_dist") for index in (0, 1)] == [[], []]
        time.sleep(8)  # longer than a requeued job waits
        assert job.ended()[::2] == ("CANCELLED", 0)
    assert "back into the queue" not in job.log()


def test_requeues_are_bounded(slurm: Slurm, dataset: str, tmp_path: Path) -> None:
    config = written_config(dataset, tmp_path, "run", **_ENDLESS)
    with submitted(slurm, config, MAX_REQUEUES="0") as job:
        job.until(lambda: slurm.processes(1, "cnsdiff_dist.distributed.launcher"))
        job.cancel("--signal=USR1")
        assert job.ended() == ("FAILED", "75:0", 0), job.log()
