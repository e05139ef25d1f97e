"""The causal model that ``cnsdiff prepare --synthetic`` leaves beside its dataset, by table row.

Shapes: U users, I items, F latent factors, B pairs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cnsdiff_dist import storage
from cnsdiff_dist.data.dataset import read_ids
from cnsdiff_dist.data.schema import Manifest

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GroundTruth:
    """``user_UF``, ``item_IF`` and ``quality_I`` make, with ``offset``, the logit of a like."""

    user_UF: npt.NDArray[np.float64]
    item_IF: npt.NDArray[np.float64]
    quality_I: npt.NDArray[np.float64]
    offset: float

    def preference(self, users: Ids, items: Ids) -> Tensor:
        """The probability that each user likes its item, [B]."""
        logits = (self.user_UF[users] * self.item_IF[items]).sum(1)
        return torch.from_numpy(logits + self.quality_I[items] + self.offset).sigmoid()


def read_ground_truth(url: str, manifest: Manifest) -> GroundTruth | None:
    """The model of the dataset at ``url``; None of a dataset that is not synthetic."""
    if not storage.exists(f"{url}/truth/model.parquet"):
        return None
    users, items = _read(url, "users"), _read(url, "items")
    user_rows, item_rows = (
        read_ids(url, manifest, side)["id"].to_numpy() for side in ("users", "items")
    )
    return GroundTruth(
        user_UF=np.stack(users["factors"].to_pylist())[user_rows],
        item_IF=np.stack(items["factors"].to_pylist())[item_rows],
        quality_I=items["quality"].to_numpy()[item_rows],
        offset=_read(url, "model")["offset"][0].as_py(),
    )


def _read(url: str, name: str) -> Any:
    with storage.open_read(f"{url}/truth/{name}.parquet") as file:
        return pq.read_table(file)
