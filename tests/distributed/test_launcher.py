"""The exit codes of launch/torchrun.sh, on one box and on two hosts."""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cnsdiff_dist.distributed import health, launcher
from cnsdiff_dist.distributed.node_network import _interface_towards, _is_own_address
from tests.support.hosts import TwoHosts, why_not
from tests.support.launching import (
    ROOT,
    SCRIPT,
    assert_same_training,
    ended,
    launched,
    until,
    until_trained,
    written_config,
)
from tests.support.ports import free_port

two_hosts = pytest.mark.skipif(bool(why_not()), reason=why_not() or "")


def _ranks(agent: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(agent.pid).children()


@pytest.mark.distributed
def test_what_the_user_must_mend_is_not_tried_again(dataset: str, tmp_path: Path) -> None:
    config = written_config(dataset, tmp_path, "run")
    with launched("train", config, "train.bathc=64", PET_NPROC_PER_NODE="2") as box:
        code, said = ended(box)
    assert code == 2
    assert "did you mean train.batch?" in said and "mend" in said
    assert "started again" not in said and "Traceback" not in said


@pytest.mark.distributed
def test_sigterm_ends_with_75_and_the_same_command_goes_on(dataset: str, tmp_path: Path) -> None:
    config = written_config(dataset, tmp_path, "run", epochs=400, patience=1000)
    with launched("train", config, PET_NPROC_PER_NODE="2") as box:
        until_trained(tmp_path / "run", box)
        for process in [*_ranks(box), box]:  # to the whole tree, as some process trackers do
            process.send_signal(signal.SIGTERM)
        code, said = ended(box)
    assert code == 75
    assert "preempted: checkpointed at step" in said and "Traceback" not in said
    config = written_config(dataset, tmp_path, "run", epochs=1, patience=1000)
    with launched("train", config, PET_NPROC_PER_NODE="2") as box:
        code, said = ended(box)
    assert code == 0 and "resumed from" in said


@pytest.mark.distributed
def test_a_killed_rank_is_started_again_until_no_restart_is_left(
    dataset: str, tmp_path: Path
) -> None:
    config = written_config(dataset, tmp_path, "run", epochs=4000, patience=100_000)
    with launched("train", config, PET_NPROC_PER_NODE="2", PET_MAX_RESTARTS="1") as box:
        until_trained(tmp_path / "run", box)
        killed = _ranks(box)
        killed[0].kill()
        again = until(lambda: [rank for rank in _ranks(box) if rank not in killed], box)
        again[0].kill()
        code, said = ended(box)
    assert code == 1
    assert "ended with SIGKILL" in said and "started again (0 restarts are left)" in said
    assert "no restart is left" in said and "Traceback" not in said


@pytest.mark.distributed
def test_ctrl_c_is_an_interruption(dataset: str, tmp_path: Path) -> None:
    config = written_config(dataset, tmp_path, "run", epochs=4000, patience=100_000)
    with launched("train", config) as box:
        until_trained(tmp_path / "run", box)
        os.killpg(box.pid, signal.SIGINT)  # as a terminal sends it, to all
        code, said = ended(box)
    assert code == 130 and "Traceback" not in said, said


@pytest.mark.slow
@pytest.mark.distributed
def test_a_stopped_night_goes_on(tmp_path: Path) -> None:
    rows = [f"u{n * 7 % 311},i{n * n % 97},{n}" for n in range(9_000)]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,timestamp", *rows]))
    config = tmp_path / "config.yaml"
    config.write_text("model: {dim: 16}\ntrain: {batch: 512, patience: 100000}\n")
    night = {
        "script": str(ROOT / "launch" / "nightly.sh"),
        "LOGS": str(tmp_path / "log.csv"),
        "NIGHTLY": str(tmp_path),
        "NIGHT": "one",
        "PREPARE": "--shift temporal --duplicates drop",
    }
    with launched(str(config), "train.epochs=4000", **night) as box:
        until(lambda: any((tmp_path / "runs/one/checkpoints").glob("step-*/commit.json")), box)
        box.send_signal(signal.SIGTERM)
        code, said = ended(box)
    assert code == 75 and "preempted: checkpointed" in said, said
    with launched(str(config), "train.epochs=1", **night) as box:
        code, said = ended(box)
    assert code == 0 and "a dataset is here already" in said and "resumed from" in said, said
    assert (tmp_path / "embeddings" / "one" / "_SUCCESS").exists()


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ({0: 2}, 2),
        ({0: 75, 1: 2, 2: -9}, 2),
        ({0: 75, 1: 75}, 75),
        ({0: 75, 1: -15}, 75),
        ({0: -9}, 1),
        ({0: 75, 1: 1}, 1),
    ],
)
def test_codes_of_ranks_together(codes: dict[int, int], code: int) -> None:
    failure = launcher._failure(codes)
    assert failure.exit_code == code
    assert all(f"rank {rank}" in str(failure) for rank in codes if codes[rank] != -15)


@pytest.mark.parametrize(
    ("text", "cores"), [("150000 100000\n", 1), ("max 100000\n", None), ("50000 100000", 1)]
)
def test_threads_respect_the_quota(text: str, cores: int | None, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert launcher._cores(tmp_path) == (cores or len(os.sched_getaffinity(0)))


def test_an_address_is_ours_or_not() -> None:
    assert _is_own_address("127.0.0.1") and _is_own_address(socket.gethostname())
    assert not _is_own_address("192.0.2.1") and not _is_own_address("no-such-host.invalid")


def test_the_interface_is_the_one_that_leads_there() -> None:
    assert _interface_towards("127.0.0.1") == "lo"
    assert _interface_towards("no-such-host.invalid") is None


def test_without_a_first_node(tmp_path: Path) -> None:
    with launched("train", "configs/demo.yaml", PET_NNODES="2") as box:
        assert ended(box) == (
            2,
            f"{SCRIPT[len(str(ROOT)) + 1 :]}: PET_NNODES=2 needs PET_MASTER_ADDR, the first node\n",
        )
    there = {"PET_NNODES": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port())}
    with launched(
        "train", "configs/demo.yaml", **there, PET_NODE_RANK="1", JOIN_SECONDS="2"
    ) as box:
        code, said = ended(box)
    assert code == 75 and "the first node does not listen at 127.0.0.1" in said


def test_options_that_torchrun_refuses_are_one_line() -> None:
    with launched("train", "configs/demo.yaml", PET_NPROC_PER_NODE="many") as box:
        code, said = ended(box)
    assert code == 2 and said.startswith("cnsdiff: error: torchrun: ") and said.count("\n") == 1


def _status(port: int, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.distributed
def test_probes(dataset: str, tmp_path: Path) -> None:
    config = written_config(dataset, tmp_path, "run", epochs=4000, patience=100_000)
    port = free_port()
    with launched("train", config, CNSDIFF_HEALTH_PORT=str(port)) as box:
        until(lambda: _status(port, "/ready") == 200, box)
        assert _status(port, "/healthz") == 200 and _status(port, "/") == 404
        box.send_signal(signal.SIGSTOP)
        assert _status(port, "/healthz") == 0  # it does not answer in time
        box.send_signal(signal.SIGCONT)
        with launched("train", config, CNSDIFF_HEALTH_PORT=str(port)) as other:
            code, said = ended(other)
        assert code == 2 and "CNSDIFF_HEALTH_PORT" in said and "in use" in said


def test_a_stuck_agent_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = health.Health()
    assert probes.answers("/healthz") is True and probes.answers("/ready") is False
    probes.set_last_round(time.monotonic())
    assert probes.answers("/ready") is True
    probes.set_last_round(time.monotonic() - health._STUCK_SECONDS - 1)
    assert probes.answers("/healthz") is False and probes.answers("/ready") is False


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    pair = TwoHosts(["run-0", "run-0.run"], ["run-1", "run-1.run"])
    try:
        pair.up()
        yield pair
    finally:
        pair.down()


def _node(hosts: TwoHosts, index: int, *words: str, **environment: str) -> Any:
    cluster = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "2",
        "PET_MASTER_ADDR": "run-0.run",
        "JOB_COMPLETION_INDEX": str(index),
    }
    return launched(*words, prefix=hosts.inside(index), **{**cluster, **environment})


@two_hosts
@pytest.mark.slow
@pytest.mark.distributed
def test_two_hosts_train_what_one_box_trains(dataset: str, tmp_path: Path, hosts: TwoHosts) -> None:
    one = written_config(dataset, tmp_path, "one")
    with launched("train", one, PET_NPROC_PER_NODE="4") as box:
        code, said = ended(box)
        assert code == 0, said
    two = written_config(dataset, tmp_path, "two")
    # The second comes first, and waits. Which is which they find out by address.
    with (
        _node(hosts, 1, "train", two, JOB_COMPLETION_INDEX="") as second,
        _node(hosts, 0, "train", two, JOB_COMPLETION_INDEX="") as first,
    ):
        code, said = ended(first)
        assert code == 0, said
        assert "4 cpu ranks" in said
        assert ended(second)[0] == 0
    assert_same_training(tmp_path / "one", tmp_path / "two")


@two_hosts
@pytest.mark.slow
@pytest.mark.distributed
def test_a_preempted_host_is_waited_for(dataset: str, tmp_path: Path, hosts: TwoHosts) -> None:
    calm = written_config(dataset, tmp_path, "calm", epochs=8, patience=1000)
    with launched("train", calm, PET_NPROC_PER_NODE="4") as box:
        assert ended(box)[0] == 0
    config = written_config(dataset, tmp_path, "run", epochs=8, patience=1000)
    with _node(hosts, 0, "train", config) as first:
        with _node(hosts, 1, "train", config) as second:
            until_trained(tmp_path / "run", second)
            second.send_signal(signal.SIGTERM)
            code, said = ended(second)
            assert code == 75 and "Traceback" not in said
        assert first.poll() is None
        with _node(hosts, 1, "train", config) as again:
            code, said = ended(first)
            assert code == 0, said
            assert "resumed from" in said and "started again" in said
            assert ended(again)[0] == 0
    assert_same_training(tmp_path / "calm", tmp_path / "run")


@two_hosts
@pytest.mark.slow
@pytest.mark.distributed
def test_without_the_first_host_the_other_ends_and_both_go_on(
    dataset: str, tmp_path: Path, hosts: TwoHosts
) -> None:
    config = written_config(dataset, tmp_path, "run", epochs=3000, patience=100_000)
    with _node(hosts, 1, "train", config) as second:
        with _node(hosts, 0, "train", config) as first:
            until_trained(tmp_path / "run", first)
            os.killpg(first.pid, signal.SIGKILL)
        code, said = ended(second)
        assert code == 75 and "Traceback" not in said, said
    config = written_config(dataset, tmp_path, "run", epochs=1, patience=100_000)
    with _node(hosts, 1, "train", config) as second, _node(hosts, 0, "train", config) as first:
        code, said = ended(first)
        assert code == 0 and "resumed from" in said, said
        assert ended(second)[0] == 0


@two_hosts
@pytest.mark.slow
@pytest.mark.distributed
def test_bad_input_of_one_host_ends_the_other(
    dataset: str, tmp_path: Path, hosts: TwoHosts
) -> None:
    config = written_config(dataset, tmp_path, "run")
    with (
        _node(hosts, 0, "train", config) as first,
        _node(hosts, 1, "train", config, "data.streams=3") as second,
    ):
        code, said = ended(second)
        assert code == 2 and "started again" not in said
        code, said = ended(first)
        assert code == 75 and "Traceback" not in said
