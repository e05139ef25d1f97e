"""The user and item embedding tables before they are sharded: their shapes and initial values."""

import torch
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.types import DataType

from cnsdiff_dist.sections import Tables

TABLES = ("user", "item")


def unallocated_tables(users: int, items: int, dim: int, config: Tables) -> EmbeddingCollection:
    """Describe the tables, [U, D] and [I, D], on the meta device; sharding allocates them."""
    tables = [
        EmbeddingConfig(
            name=name,
            embedding_dim=dim,
            num_embeddings=rows,
            feature_names=[name],
            data_type=DataType[config.dtype(name).upper()],
        )
        for name, rows in zip(TABLES, (users, items), strict=True)
    ]
    return EmbeddingCollection(device=torch.device("meta"), tables=tables)


def initial_rows(
    table: str, start: int, stop: int, dim: int, std: float, seed: int
) -> torch.Tensor:
    """Draw the initial rows [start, stop) of a table from N(0, std^2): float32 [stop - start, D].

    The rows are drawn in blocks with a seed of (seed, table, block), so a row's initial value
    depends neither on the world size nor on how the table is sharded.
    """
    block_rows = 4096
    parts = []
    for block in range(start // block_rows, -(-stop // block_rows)):
        key = (seed * len(TABLES) + TABLES.index(table)) * 1_000_003 + block
        rows = torch.randn(block_rows, dim, generator=torch.Generator().manual_seed(key))
        first = block * block_rows
        parts.append(rows[max(start - first, 0) : min(stop - first, block_rows)])
    return std * torch.cat(parts) if parts else torch.empty(0, dim)
