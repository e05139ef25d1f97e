"""LightGCN (He et al., SIGIR 2020, eq. 7-8) over blocks.

A block is the part of the graph a step propagates over: which rows of the tables it
needs and a square sparse operator among them. Here a block is the whole train graph;
a sampled block is another ``Block`` and changes nothing else.

Shapes: N nodes of a block, users first; D embedding dim; B batch.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnsdiff_dist.data.graph import GraphArrays


@dataclass(frozen=True)
class Block:
    """``users`` and ``items`` are the table rows of its nodes; ``operator`` is Â [N, N]."""

    users: Tensor
    items: Tensor
    operator: Tensor | None


def full_block(graph: GraphArrays, layers: int, device: torch.device) -> Block:
    """The whole train graph as one block, Â = D^-1/2 A D^-1/2 in CSR.

    Isolated nodes have empty rows: their embeddings are simply not mixed.
    """
    users, items = len(graph.user_indptr) - 1, len(graph.item_indptr) - 1
    ids = [torch.arange(count, device=device) for count in (users, items)]
    return Block(ids[0], ids[1], normalised_adjacency(graph).to(device) if layers else None)


def normalised_adjacency(graph: GraphArrays) -> Tensor:
    """Â of the bipartite train graph, float32 sparse CSR [U + I, U + I]."""
    users = len(graph.user_indptr) - 1
    edges = len(graph.user_items)
    user_degree, item_degree = np.diff(graph.user_indptr), np.diff(graph.item_indptr)
    scale = 1 / np.sqrt(np.maximum(np.concatenate([user_degree, item_degree]), 1))
    columns = np.concatenate([graph.user_items.astype(np.int64) + users, graph.item_users])
    rows = np.repeat(np.arange(len(scale)), np.concatenate([user_degree, item_degree]))
    indptr = np.concatenate([graph.user_indptr, graph.item_indptr[1:] + edges])
    # 32-bit indices halve the index traffic and are what the CPU kernel computes with.
    index = np.int32 if 2 * edges < 2**31 and len(scale) < 2**31 else np.int64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "sparse CSR support is in beta"
        return torch.sparse_csr_tensor(
            torch.from_numpy(indptr.astype(index)),
            torch.from_numpy(columns.astype(index)),
            torch.from_numpy((scale[rows] * scale[columns]).astype(np.float32)),
            size=(len(scale), len(scale)),
        )


class _MeanOfPowers(torch.autograd.Function):
    """x -> mean(x, Âx, .., Â^L x). Â is symmetric, so the gradient is the same map."""

    @staticmethod
    def forward(ctx: Any, embedding_ND: Tensor, operator: Tensor, layers: int) -> Tensor:
        ctx.operator, ctx.layers = operator, layers
        return _mean_of_powers(embedding_ND, operator, layers)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_ND,) = gradients
        return _mean_of_powers(gradient_ND.contiguous(), ctx.operator, ctx.layers), None, None


def _mean_of_powers(x_ND: Tensor, operator: Tensor, layers: int) -> Tensor:
    # Horner: mean = (x + Â(x + Â(x + ..))) / (L + 1), one temporary at a time, the division
    # folded into the last product.
    out_ND = x_ND
    for layer in range(1, layers + 1):
        scale = 1 / (layers + 1) if layer == layers else 1.0
        out_ND = torch.addmm(x_ND, operator, out_ND, beta=scale, alpha=scale)
    return out_ND


def propagate(block: Block, embedding_ND: Tensor, layers: int) -> Tensor:
    """h = mean(H0..HL) with H0 = embedding and Hk = Â H(k-1); [N, D] -> [N, D]."""
    if layers == 0 or block.operator is None:
        return embedding_ND
    out: Tensor = _MeanOfPowers.apply(embedding_ND, block.operator, layers)  # type: ignore[no-untyped-call]
    return out
