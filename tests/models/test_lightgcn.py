import numpy as np
import pytest
import torch

from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.models.lightgcn import Block, full_block, propagate


def _whole(graph: GraphArrays) -> Block:
    return full_block(graph, np.array([0, 3]), np.array([2]))


def _dense(graph: GraphArrays) -> torch.Tensor:
    """D^-1/2 A D^-1/2 written densely from the user side alone."""
    users, items = len(graph.user_indptr) - 1, len(graph.item_indptr) - 1
    adjacency = torch.zeros(users + items, users + items, dtype=torch.float64)
    for user in range(users):
        for item in graph.user_items[graph.user_indptr[user] : graph.user_indptr[user + 1]]:
            adjacency[user, users + item] = adjacency[users + item, user] = 1
    degree = adjacency.sum(1)
    scale = torch.where(degree > 0, degree.clamp(min=1) ** -0.5, torch.zeros_like(degree))
    return scale[:, None] * adjacency * scale


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_propagation_is_the_mean_of_dense_matrix_powers(
    tiny_graph: GraphArrays, layers: int
) -> None:
    block = _whole(tiny_graph)
    embedding = torch.randn(9, 4, requires_grad=True)
    out = propagate(block, embedding, layers)
    powers = sum(torch.linalg.matrix_power(_dense(tiny_graph), k) for k in range(layers + 1))
    operator = (powers / (layers + 1)).float()
    assert torch.allclose(out, operator @ embedding, atol=1e-6)

    upstream = torch.randn(9, 4)
    (gradient,) = torch.autograd.grad(out, embedding, upstream)
    assert torch.allclose(gradient, operator.t() @ upstream, atol=1e-6)


def test_isolated_nodes_keep_a_share_of_their_own_embedding(tiny_graph: GraphArrays) -> None:
    out = propagate(_whole(tiny_graph), torch.ones(9, 4), 2)
    assert torch.allclose(out[3], torch.full((4,), 1 / 3))


def test_users_come_first_then_items(tiny_graph: GraphArrays) -> None:
    block = _whole(tiny_graph)
    assert block.users.tolist() == list(range(5)) and block.items.tolist() == list(range(4))
    assert block.operator is not None
    assert np.allclose(block.operator.to_dense()[:5, :5], 0)
