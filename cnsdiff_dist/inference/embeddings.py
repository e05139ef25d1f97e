"""Embeddings as Parquet, with raw ids."""

import pyarrow as pa
from torch import Tensor

from cnsdiff_dist.data.dataset import Side, read_id_blocks
from cnsdiff_dist.inference.output_directory import begin_output, commit_output, open_part
from cnsdiff_dist.inference.trained_model import TrainedModel


def write_embeddings(model: TrainedModel, url: str, alpha: float = 0.0) -> None:
    """Write a directory per side with columns ``id`` and ``embedding`` (list of D float32).

    Each rank writes the rows that it owns, a block at a time. ``alpha`` is the adjustment that
    the model's vectors have, for the record. Collective.
    """
    run, world = model.run, model.run.world
    begin_output(world, url)
    sides: tuple[tuple[Side, Tensor], ...] = (("users", model.user_RD), ("items", model.item_RD))
    for side, table_RD in sides:
        own = world.own_rows(run.manifest.ids[side].rows)
        with open_part(world, f"{url}/{side}") as write:
            for first, ids in read_id_blocks(run.data_url, run.manifest, side, own):
                rows_RD = table_RD[first - own.start :][: len(ids)].float().cpu()
                flat = pa.array(rows_RD.numpy().ravel())
                vectors = pa.FixedSizeListArray.from_arrays(flat, rows_RD.shape[1])
                write(pa.table({"id": ids, "embedding": vectors}))
    counts = {"users": run.manifest.users, "items": run.manifest.items}
    record = {"step": model.step, "dim": model.user_RD.shape[1], "alpha": alpha, **counts}
    commit_output(world, url, record)
