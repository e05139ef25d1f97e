"""LightGCN (He et al., SIGIR 2020, eq. 7-8) over blocks.

A block is the part of the graph that a step propagates over: the rows of the tables that it
needs, and Â among them, whole (``full_block``) or sampled hop by hop (``sampled_block``).

Shapes: N nodes of a block, users first; T nodes that are asked for; D embedding dim.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.neighbours import Hop, sample_hops
from cnsdiff_dist.distributed.world import to_device

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SampledHop:
    """``operator`` [R, C] is a sampled Â: its rows are the nodes at ``rows`` [R] of the block,
    its columns the rows of the next hop or, in the last one, all N nodes. ``transposed`` [C, R]
    is the same for the gradient."""

    rows: Tensor
    operator: Tensor
    transposed: Tensor

    def to(self, device: torch.device) -> "SampledHop":
        return SampledHop(
            to_device(self.rows, device),
            _csr_to(self.operator, device),
            _csr_to(self.transposed, device),
        )


@dataclass(frozen=True)
class Block:
    """``users`` and ``items`` are the distinct table rows of its nodes.

    ``propagate`` gives the embeddings of T nodes, which are those at ``targets`` [T] of the
    block, or all N if that is None; ``position`` says which of them each id asked for is.
    ``operator`` is Â [N, N] of a full block, ``hops`` are those of a sampled one; with neither
    there is no graph.
    """

    users: Tensor
    items: Tensor
    position: Tensor
    targets: Tensor | None = None
    operator: Tensor | None = None
    hops: tuple[SampledHop, ...] = ()

    def to(self, device: torch.device) -> "Block":
        """Itself on the device; nothing waits for the copies."""
        return Block(
            to_device(self.users, device),
            to_device(self.items, device),
            to_device(self.position, device),
            None if self.targets is None else to_device(self.targets, device),
            None if self.operator is None else _csr_to(self.operator, device),
            tuple(hop.to(device) for hop in self.hops),
        )


def _csr_to(operator: Tensor, device: torch.device) -> Tensor:
    if operator.device == device:
        return operator
    parts = (operator.crow_indices(), operator.col_indices(), operator.values())
    indptr, columns, values = (to_device(part, device) for part in parts)
    return csr(indptr, columns, values, (operator.shape[0], operator.shape[1]))


def full_block(graph: GraphArrays, users: Ids, items: Ids) -> Block:
    """The whole train graph as one block, Â = D^-1/2 A D^-1/2 in CSR.

    Isolated nodes have empty rows: their embeddings are simply not mixed.
    """
    return Block(
        torch.arange(graph.users),
        torch.arange(graph.items),
        full_position(graph, users, items),
        operator=normalised_adjacency(graph),
    )


def full_position(graph: GraphArrays, users: Ids, items: Ids) -> Tensor:
    """Where users and items lie in a block of all nodes."""
    return torch.from_numpy(np.concatenate([users, items + graph.users]))


def sampled_block(
    graph: GraphArrays, users: Ids, items: Ids, fan_out: tuple[int, ...], key: tuple[int, int, int]
) -> Block:
    """The block that some users and items (ids may repeat) need for ``len(fan_out)`` layers.

    Without layers that is their own rows. ``key`` as in :func:`sample_hops`.
    """
    first_item = graph.users
    asked, position = np.unique(np.concatenate([users, items + first_item]), return_inverse=True)
    hops = sample_hops(graph, asked, fan_out, key)
    parts = [hop.nodes for hop in hops] + [hops[-1].columns if hops else asked]
    nodes, places = np.unique(np.concatenate(parts), return_inverse=True)
    split = np.split(places, np.cumsum([len(part) for part in parts])[:-1])
    cut = int(np.searchsorted(nodes, first_item))
    return Block(
        torch.from_numpy(nodes[:cut]),
        torch.from_numpy(nodes[cut:] - first_item),
        torch.from_numpy(position),
        torch.from_numpy(split[0]) if hops else None,
        hops=tuple(_hops(hops, split, len(nodes))),
    )


def _hops(hops: list[Hop], places: list[Ids], nodes: int) -> list[SampledHop]:
    """Renumber the columns: those of the last hop are places among all nodes already."""
    out = []
    for index, hop in enumerate(hops):
        last = index + 1 == len(hops)
        columns = places[-1] if last else np.searchsorted(hops[index + 1].nodes, hop.columns)
        shape = (len(hop.nodes), nodes if last else len(hops[index + 1].nodes))
        parts = (
            torch.from_numpy(hop.indptr.astype(np.int32)),
            torch.from_numpy(columns.astype(np.int32)),
            torch.from_numpy(hop.values),
        )
        out.append(
            SampledHop(torch.from_numpy(places[index]), csr(*parts, shape), _csr_t(*parts, shape))
        )
    return out


def csr(indptr: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "sparse CSR support is in beta"
        return torch.sparse_csr_tensor(indptr, columns, values, size=shape)


def _csr_t(indptr: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    ascending, order = torch.sort(columns, stable=True)
    rows = torch.arange(shape[0], dtype=torch.int32).repeat_interleave(indptr.diff())
    starts = torch._convert_indices_from_coo_to_csr(ascending, shape[1], out_int32=True)
    return csr(starts, rows[order], values[order], shape[::-1])


def normalised_adjacency(graph: GraphArrays) -> Tensor:
    """Â of the bipartite train graph, float32 sparse CSR [U + I, U + I]."""
    users, edges = graph.users, len(graph.user_items)
    user_degree, item_degree = np.diff(graph.user_indptr), np.diff(graph.item_indptr)
    scale = 1 / np.sqrt(np.maximum(np.concatenate([user_degree, item_degree]), 1))
    columns = np.concatenate([graph.user_items.astype(np.int64) + users, graph.item_users])
    rows = np.repeat(np.arange(len(scale)), np.concatenate([user_degree, item_degree]))
    indptr = np.concatenate([graph.user_indptr, graph.item_indptr[1:] + edges])
    # 32-bit indices halve the index traffic and are what the CPU kernel computes with.
    index = np.int32 if 2 * edges < 2**31 and len(scale) < 2**31 else np.int64
    return csr(
        torch.from_numpy(indptr.astype(index)),
        torch.from_numpy(columns.astype(index)),
        torch.from_numpy((scale[rows] * scale[columns]).astype(np.float32)),
        (len(scale), len(scale)),
    )


def propagate(block: Block, embedding_ND: Tensor, layers: int) -> Tensor:
    """h = mean(H0..HL) with H0 = embedding and Hk = Â H(k-1); [N, D] -> [T, D].

    A sampled block has its own Â for each hop, so ``layers`` is the number of its hops.
    """
    out: Tensor = embedding_ND
    if block.operator is not None and layers:
        out = _MeanOfPowers.apply(embedding_ND, block.operator, layers)  # type: ignore[no-untyped-call]
    elif block.hops:
        out = _MeanOfHops.apply(embedding_ND, block.hops)  # type: ignore[no-untyped-call]
    return out


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


class _MeanOfHops(torch.autograd.Function):
    """The same by Horner with a sampled Â per hop: (x + Â1(x + Â2(x + ..))) / (L + 1), each x
    and each product at the rows of the hop only."""

    @staticmethod
    def forward(ctx: Any, embedding_ND: Tensor, hops: tuple[SampledHop, ...]) -> Tensor:
        ctx.hops = hops
        out = embedding_ND
        for number, hop in enumerate(reversed(hops), start=1):
            scale = 1 / (len(hops) + 1) if number == len(hops) else 1.0
            own_RD = embedding_ND.index_select(0, hop.rows)
            out = torch.addmm(own_RD, hop.operator, out, beta=scale, alpha=scale)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        at_RD = [gradients[0] / (len(ctx.hops) + 1)]
        for hop in ctx.hops:
            at_RD.append(hop.transposed @ at_RD[-1])
        gradient_ND = at_RD.pop()
        for hop, own_RD in zip(ctx.hops, at_RD, strict=True):
            gradient_ND.index_add_(0, hop.rows, own_RD)
        return gradient_ND, None
