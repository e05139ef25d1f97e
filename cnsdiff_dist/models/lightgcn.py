"""LightGCN (He et al., SIGIR 2020, eq. 7-8) over the part of the graph that a step needs.

That part is a block: some table rows, and Â among their nodes. The block is the whole graph
(``full_block``) or is sampled hop by hop (``sampled_block``).

Shapes: V nodes of a block, users first; v nodes of one hop; Q nodes of a block whose output is
asked for; D embedding dimension; U users and I items of the whole catalogue.
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
    """The sampled Â of one hop.

    Attributes:
        rows: the positions in the block of the hop's nodes, int64 [v].
        operator: the sampled Â, sparse CSR [v, columns]. Its columns are the nodes of the next
            hop or, in the last hop, all V nodes of the block.
        transposed: the transpose of ``operator`` in CSR, for the gradient.
    """

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
    """The nodes that a step propagates over, and Â among them. Without a graph there is no Â.

    Attributes:
        users, items: the distinct table rows of the V nodes, int64.
        position: for each id that the block was made for, users first, its position among the Q
            nodes, int64.
        targets: the positions of the Q nodes in the block, int64 [Q]; None if they are all V.
        operator: Â of a full block, sparse CSR [V, V].
        hops: the hops of a sampled block.
    """

    users: Tensor
    items: Tensor
    position: Tensor
    targets: Tensor | None = None
    operator: Tensor | None = None
    hops: tuple[SampledHop, ...] = ()

    def to(self, device: torch.device) -> "Block":
        """Return the block on the device. The host does not wait for the copies."""
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
    """Return the whole train graph as one block.

    A node without neighbours has an empty row in Â, so its embedding is mixed with no other.
    """
    return Block(
        torch.arange(graph.users),
        torch.arange(graph.items),
        full_position(graph, users, items),
        operator=normalised_adjacency(graph),
    )


def full_position(graph: GraphArrays, users: Ids, items: Ids) -> Tensor:
    """Return the positions of users and items in a block of all nodes, users first."""
    return torch.from_numpy(np.concatenate([users, items + graph.users]))


def sampled_block(
    graph: GraphArrays, users: Ids, items: Ids, fan_out: tuple[int, ...], key: tuple[int, int, int]
) -> Block:
    """Sample the block that some users and items need for ``len(fan_out)`` layers.

    Without layers the block is their own rows.

    Args:
        users, items: table rows; they may repeat.
        fan_out: the neighbours that a node keeps in each hop.
        key: (seed, epoch, step), as in :func:`sample_hops`.
    """
    first_item = graph.users
    asked, position = np.unique(np.concatenate([users, items + first_item]), return_inverse=True)
    hops = sample_hops(graph, asked, fan_out, key)
    parts = [hop.nodes for hop in hops] + [hops[-1].columns if hops else asked]
    nodes, places = np.unique(np.concatenate(parts), return_inverse=True)
    split = np.split(places, np.cumsum([len(part) for part in parts])[:-1])
    user_count = int(np.searchsorted(nodes, first_item))
    return Block(
        torch.from_numpy(nodes[:user_count]),
        torch.from_numpy(nodes[user_count:] - first_item),
        torch.from_numpy(position),
        torch.from_numpy(split[0]) if hops else None,
        hops=tuple(_hops(hops, split, len(nodes))),
    )


def _hops(hops: list[Hop], places: list[Ids], nodes: int) -> list[SampledHop]:
    """Renumber the columns of the hops, which name nodes of the graph.

    Args:
        places: the positions in the block of each hop's rows, then of the last hop's columns.
        nodes: V.
    """
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
        rows = torch.from_numpy(places[index])
        out.append(SampledHop(rows, csr(*parts, shape), _transposed_csr(*parts, shape)))
    return out


def csr(indptr: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Make a sparse CSR tensor, without torch's warning that its support of CSR is in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(indptr, columns, values, size=shape)


def _transposed_csr(
    indptr: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]
) -> Tensor:
    ascending, order = torch.sort(columns, stable=True)
    rows = torch.arange(shape[0], dtype=torch.int32).repeat_interleave(indptr.diff())
    starts = torch._convert_indices_from_coo_to_csr(ascending, shape[1], out_int32=True)
    return csr(starts, rows[order], values[order], shape[::-1])


def normalised_adjacency(graph: GraphArrays) -> Tensor:
    """Return Â = D^-1/2 A D^-1/2 of the bipartite train graph, float32 CSR [U + I, U + I]."""
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


def propagate(block: Block, embedding_VD: Tensor, layers: int) -> Tensor:
    """Return the mean of H_0 .. H_layers, where H_0 is the embeddings and H_k = Â H_(k-1).

    Args:
        layers: of a full block. A sampled block has an Â for each hop, so its number of layers is
            that of its hops.

    Returns:
        The output of the Q nodes, [Q, D].
    """
    if block.operator is not None and layers:
        return _MeanOfPowers.apply(embedding_VD, block.operator, layers)  # type: ignore[no-untyped-call]
    if block.hops:
        return _MeanOfHops.apply(embedding_VD, block.hops)  # type: ignore[no-untyped-call]
    return embedding_VD


class _MeanOfPowers(torch.autograd.Function):
    """x -> mean(x, Âx, .., Â^layers x). Â is symmetric, so the gradient is the same map."""

    @staticmethod
    def forward(ctx: Any, embedding_VD: Tensor, operator: Tensor, layers: int) -> Tensor:
        ctx.operator, ctx.layers = operator, layers
        return _mean_of_powers(embedding_VD, operator, layers)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_VD,) = gradients
        return _mean_of_powers(gradient_VD.contiguous(), ctx.operator, ctx.layers), None, None


def _mean_of_powers(x_VD: Tensor, operator: Tensor, layers: int) -> Tensor:
    """Horner's scheme: (x + Â(x + Â(x + ..))) / (layers + 1).

    It needs one temporary at a time, and the last product does the division.
    """
    out_VD = x_VD
    for layer in range(1, layers + 1):
        scale = 1 / (layers + 1) if layer == layers else 1.0
        out_VD = torch.addmm(x_VD, operator, out_VD, beta=scale, alpha=scale)
    return out_VD


class _MeanOfHops(torch.autograd.Function):
    """Horner's scheme with an Â for each hop: (x + Â1(x + Â2(x + ..))) / (hops + 1).

    Each sum is computed only at the rows of its hop.
    """

    @staticmethod
    def forward(ctx: Any, embedding_VD: Tensor, hops: tuple[SampledHop, ...]) -> Tensor:
        ctx.hops = hops
        out = embedding_VD
        for number, hop in enumerate(reversed(hops), start=1):
            scale = 1 / (len(hops) + 1) if number == len(hops) else 1.0
            own_vD = embedding_VD.index_select(0, hop.rows)
            out = torch.addmm(own_vD, hop.operator, out, beta=scale, alpha=scale)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient_of_rows = [gradients[0] / (len(ctx.hops) + 1)]
        for hop in ctx.hops:
            gradient_of_rows.append(hop.transposed @ gradient_of_rows[-1])
        gradient_VD = gradient_of_rows.pop()
        for hop, own_vD in zip(ctx.hops, gradient_of_rows, strict=True):
            gradient_VD.index_add_(0, hop.rows, own_vD)
        return gradient_VD, None
