"""Faults of nodes and of the link between them."""

from contextlib import ExitStack, suppress

import psutil

from tests.chaos.invariants import Calm
from tests.chaos.job import Job, Node
from tests.chaos.lab import Lab
from tests.chaos.network import TwoNodes
from tests.chaos.scenario import Scenario
from tests.chaos.store import LocalRun


class NodeScenario(Scenario):
    """Two nodes of one rank each; the world may have either size."""

    exact = False
    epochs, step_seconds = 12, 0.4

    def job(self, lab: Lab, stack: ExitStack) -> Job:
        self._network = TwoNodes()
        stack.callback(self._network.down)
        nodes = self._network.up()
        run = LocalRun(lab.folder / self.name / "run")
        return lab.job(self.name, run, self.epochs, nodes=nodes)

    def kill_node(self, node: Node) -> None:
        processes = node.ranks()
        if node.agent is not None:
            node.agent.kill()
        for process in processes:
            with suppress(psutil.Error):
                process.kill()


class NodesComeAndGo(NodeScenario):
    """A node starts alone, another joins; it dies, returns; then that with the rendezvous dies."""

    name = "nodes"

    def disturb(self, lab: Lab, job: Job, calm: Calm) -> None:
        first, second = job.nodes
        if not job.until_world(2):
            return
        second.wanted = False
        job.recover(lambda: self.kill_node(second))
        if not job.until_world(1) or not job.go_on(3):
            return
        second.wanted = True
        job.recover(lambda: job.launch(second))
        if not job.until_world(2) or not job.go_on(3):
            return
        job.recover(lambda: self.kill_node(first))
        job.until_world(2)


class LinkCut(NodeScenario):
    """The network between two nodes is cut for longer than they wait, and comes back."""

    name, times = "link", 1

    def disturb(self, lab: Lab, job: Job, calm: Calm) -> None:
        if not job.until_world(2) or not job.go_on(2):
            return
        try:
            there = job.recover(self._network.cut, 180) and job.go_on(5)
        finally:
            self._network.mend()
        if there:
            job.outlast(lambda: None)
            job.until_world(2)
