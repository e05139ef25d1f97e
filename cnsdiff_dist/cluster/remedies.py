"""What to change of a job that does not fit its cluster."""

from dataclasses import replace

from cnsdiff_dist.cluster.cost_model import Estimate, Job, estimate, with_tables
from cnsdiff_dist.cluster.table_placement import PLACEMENTS


def estimate_with_remedies(job: Job, base_bytes: int = 0) -> Estimate:
    """What a job needs under its own placement and, where it does not fit, what to change.

    ``base_bytes`` are what a process holds before it has tables.
    """
    found = estimate(job, base_bytes, job.config.tables.placement)
    changes = _for_the_world_size(job)
    if not found.fits:
        changes += _what_fits(job, base_bytes, found.placement)
    return replace(found, changes=changes)


def _for_the_world_size(job: Job) -> list[str]:
    config, ranks = job.config, job.cluster.ranks
    if config.data.streams % ranks == 0:
        return []
    streams = ranks * -(-config.data.streams // ranks)
    batch = streams * -(-config.train.batch // streams)
    more = f" train.batch={batch}" if batch != config.train.batch else ""
    return [f"data.streams={streams}{more} (a multiple of the {ranks} ranks)"]


def _what_fits(job: Job, base: int, placement: str) -> list[str]:
    """Changes of which each alone is enough."""
    found = []
    for other in (name for name in PLACEMENTS if job.cluster.cuda and name != placement):
        if estimate(job, base, other).fits:
            note = " (planned only: training from SSD is not supported)"
            found.append(f"tables.placement={other}{note if other == 'ssd' else ''}")
    if estimate(with_tables(job, user_dtype="fp16", item_dtype="fp16"), base, placement).fits:
        found.append("tables.user_dtype=fp16 tables.item_dtype=fp16")
    if nodes := _enough_nodes(job, base, placement):
        found.append(f"--nodes {nodes}")
    return found or ["nothing tried here is enough: a smaller model.dim or train.batch"]


def _enough_nodes(job: Job, base: int, placement: str) -> int | None:
    """A number of nodes that suffices; each of twice as many has half of the block's rows."""
    nodes, now = job.cluster.nodes, job.cluster.nodes
    while nodes < 4096 * now:
        nodes *= 2
        fewer = replace(job.sizes, block_nodes=job.sizes.block_nodes * now // nodes)
        larger = replace(job, cluster=replace(job.cluster, nodes=nodes), sizes=fewer)
        if estimate(larger, base, placement).fits:
            return nodes
    return None
