"""The embedding tables, described but not yet allocated."""

import torch
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.types import DataType

from cnsdiff_dist.config import Tables

TABLES = ("user", "item")


def embedding_tables(users: int, items: int, dim: int, config: Tables) -> EmbeddingCollection:
    """The user [U, D] and item [I, D] tables on the meta device; sharding allocates them."""
    return EmbeddingCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingConfig(
                name=name, embedding_dim=dim, num_embeddings=rows, feature_names=[name],
                data_type=DataType[config.dtype(name).upper()],
            )
            for name, rows in zip(TABLES, (users, items), strict=True)
        ],
    )  # fmt: skip


def initial_rows(
    table: str, start: int, stop: int, dim: int, std: float, seed: int
) -> torch.Tensor:
    """Rows [start, stop) of a freshly initialised table: N(0, std^2), float32 [stop-start, D].

    Drawn in blocks keyed by (seed, table, block), so a row's first value depends neither
    on the world size nor on how the table is sharded.
    """
    block_rows = 4096
    parts = []
    for block in range(start // block_rows, -(-stop // block_rows)):
        key = (seed * len(TABLES) + TABLES.index(table)) * 1_000_003 + block
        rows = torch.randn(block_rows, dim, generator=torch.Generator().manual_seed(key))
        first = block * block_rows
        parts.append(rows[max(start - first, 0) : min(stop - first, block_rows)])
    return std * torch.cat(parts) if parts else torch.empty(0, dim)
