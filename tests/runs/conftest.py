"""Trainings that the tests of this folder look at."""

import signal
import socket
from contextlib import closing

import pytest

from cnsdiff_dist.runs.status import read_status
from tests.support.observing import Watched, scrape
from tests.support.ports import free_port
from tests.support.processes import long_training, started, wait_for
from tests.support.runs import committed_steps


@pytest.fixture(scope="session")
def watched(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """A training that was scraped while it ran, and then preempted."""
    port = free_port()
    run, words = long_training(
        dataset, tmp_path_factory.mktemp("watched"), checkpoint={"every_steps": 7, "keep": 100_000}
    )
    with started(*words, f"run.metrics_port={port}") as process:
        wait_for(lambda: len(committed_steps(run)) > 3)
        scraped = wait_for(lambda: "last_checkpoint" in (text := scrape(port)) and text)
        running = read_status(str(run))
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    with closing(socket.socket()) as probe:
        closed = probe.connect_ex(("127.0.0.1", port)) != 0
    return Watched(run, scraped, running, read_status(str(run)), closed)
