"""What leaves a run: embeddings and top-K lists, as Parquet with raw ids.

Each rank writes its own part; ``_SUCCESS``, a line of JSON, is written last.
"""

import json
import re

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cnsdiff_dist import storage
from cnsdiff_dist.data.dataset import read_ids
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.evaluator import rank, train_interactions
from cnsdiff_dist.trained import Trained

Ids = npt.NDArray[np.int64]
_DONE = "_SUCCESS"  # readers of a Parquet directory skip names with an underscore
_PART = re.compile(r"((users|items)/)?part-\d{5}\.parquet")


def write_embeddings(model: Trained, url: str, alpha: float = 0.0) -> None:
    """Columns ``id`` and ``embedding`` (fixed-size list of float32) per side. Collective."""
    _begin(model, url)
    for side, table_ND in (("users", model.user_UD), ("items", model.item_ID)):
        raw = read_ids(model.data_url, model.manifest, side)["id"].combine_chunks()
        mine = np.array_split(np.arange(len(raw)), model.world.size)[model.world.rank]
        flat = table_ND[torch.from_numpy(mine).to(table_ND.device)].float().cpu().numpy().ravel()
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat), table_ND.shape[1])
        _write_part(
            model, f"{url}/{side}", pa.table({"id": raw.take(pa.array(mine)), "embedding": vectors})
        )
    counts = {"users": model.manifest.users, "items": model.manifest.items}
    _commit(model, url, {"dim": model.user_UD.shape[1], "alpha": alpha, **counts})


def listed_users(model: Trained, file: str | None) -> Ids:
    """The rows of the raw user ids in a text file, each once; all users without a file.

    Raises:
        UserError: a line that is not a user of the dataset.
    """
    raw = read_ids(model.data_url, model.manifest, "users")["id"].to_pylist()
    if file is None:
        return np.arange(len(raw))
    row_of = {str(identity): row for row, identity in enumerate(raw)}
    rows = []
    for number, line in enumerate(storage.read_text(file).splitlines(), start=1):
        if line.strip() and line.strip() not in row_of:
            where = f"{storage.display(file)} line {number}"
            raise UserError(f"{where}: {line.strip()!r} is not a user of this dataset")
        if line.strip():
            rows.append(row_of[line.strip()])
    if not rows:
        raise UserError(f"{storage.display(file)}: no user ids in it")
    return np.array(list(dict.fromkeys(rows)), np.int64)


def write_recommendations(model: Trained, url: str, users: Ids, k: int) -> int:
    """Columns ``user``, ``item``, ``score``, ``rank``; train items left out. Collective.

    Returns:
        rows written by all ranks.
    """
    _begin(model, url)
    raw = {
        side: read_ids(model.data_url, model.manifest, side)["id"].combine_chunks()
        for side in ("users", "items")
    }
    mine = np.array_split(users, model.world.size)[model.world.rank]
    chunk = model.config.evaluation.users_per_chunk
    masks = [train_interactions(model.graph)]
    parts = []
    for some, score_BK, item_BK in rank(model.user_UD, model.item_ID, mine, masks, k, chunk):
        row, column = np.nonzero(np.isfinite(score_BK))
        parts.append(
            pa.table(
                {
                    "user": raw["users"].take(pa.array(some[row])),
                    "item": raw["items"].take(pa.array(item_BK[row, column])),
                    "score": score_BK[row, column],
                    "rank": (column + 1).astype(np.int32),
                }
            )
        )
    rows = sum(len(part) for part in parts)
    if parts:
        _write_part(model, url, pa.concat_tables(parts))
    total = int(model.world.sum(torch.tensor([rows], device=model.world.device)))
    _commit(model, url, {"k": k, "users": len(users), "rows": total})
    return total


def _begin(model: Trained, url: str) -> None:
    """Remove an older output of ours, its ``_SUCCESS`` first; refuse to touch anything else.

    Raises:
        UserError: ``url`` holds other files.
    """
    if model.world.is_main:
        found = storage.list_files(url)
        foreign = [name for name in found if name != _DONE and not _PART.fullmatch(name)]
        if foreign:
            raise UserError(
                f"{storage.display(url)}: holds other files ({foreign[0]}); "
                "choose an empty directory"
            )
        for name in sorted(found, key=lambda name: name != _DONE):
            storage.delete_tree(f"{url}/{name}")
    model.world.barrier()


def _write_part(model: Trained, url: str, table: pa.Table) -> None:
    with storage.open_write(f"{url}/part-{model.world.rank:05d}.parquet") as file:
        pq.write_table(table, file)


def _commit(model: Trained, url: str, record: dict[str, float]) -> None:
    model.world.barrier()
    if model.world.is_main:
        text = json.dumps({"step": model.step, **record})
        storage.write_text(f"{url}/{_DONE}", text + "\n")
    model.world.barrier()
