"""The scenarios by the names of their faults."""

from tests.chaos.bucket_faults import BadNetwork, BucketDies, BucketKillRank, BucketPauses
from tests.chaos.machine_faults import ClockJumps, Damage, DiskFull
from tests.chaos.node_faults import LinkCut, NodesComeAndGo
from tests.chaos.process_faults import KillAgent, KillInCheckpoint, KillRank, Sigterm, StopRank
from tests.chaos.scenario import Scenario

_PROCESS: list[type[Scenario]] = [KillRank, KillInCheckpoint, KillAgent, StopRank, Sigterm]
_MACHINE: list[type[Scenario]] = [Damage, ClockJumps, DiskFull]
_BUCKET: list[type[Scenario]] = [BucketKillRank, BucketPauses, BucketDies, BadNetwork]
_NODE: list[type[Scenario]] = [NodesComeAndGo, LinkCut]
ALL = {scenario.name: scenario for scenario in [*_PROCESS, *_MACHINE, *_BUCKET, *_NODE]}
