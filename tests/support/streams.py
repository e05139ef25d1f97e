"""Train streams of a prepared dataset."""

from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.data.epoch_plan import EpochPlan, local_streams
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.data.stream import TrainStream


def plan_of(manifest: Manifest) -> EpochPlan:
    return EpochPlan(manifest.train.rows, batch=440, streams=4, block_rows=300, seed=1)


def train_stream(
    dataset: str, rank: int = 0, world_size: int = 1, prefetch: int = 2
) -> TrainStream:
    manifest = load_manifest(dataset)
    streams = local_streams(4, rank, world_size)
    return TrainStream(dataset, manifest, plan_of(manifest), streams, prefetch)
