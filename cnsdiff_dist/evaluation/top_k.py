"""Top-K lists when the items are sharded over ranks.

Ranking goes in rounds. In a round every rank contributes up to ``chunk`` of its own users, every
rank searches its own items for the users of all ranks, and the ranks' lists are merged. So no
rank holds the whole catalogue. A rank owns the rows that :meth:`World.own_rows` gives it.

Shapes: A users of all ranks in one round, B this rank's users in a round, R items that this rank
owns, C columns of a score matrix handled at a time, D embedding dimension, K list length.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnsdiff_dist.data.interactions import Interactions
from cnsdiff_dist.distributed.world import World

Ids = npt.NDArray[np.int64]
Search = Callable[[Tensor, Ids], tuple[Tensor, Tensor]]
"""Finds the K best of this rank's items for the users of a round.

Called with the users' vectors [A, D] and their table rows [A], -1 where there is no user. Returns
scores and items [A, K], best first. An entry that scores ``MASKED_SCORE`` or less is no
recommendation.
"""

ITEMS_AT_A_TIME = 16_384
MASKED_SCORE = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class TopKLists:
    """One round's lists, best first.

    ``users`` [B] are this rank's, with ``scores`` and ``items`` [B, K]. ``items_of_all_ranks``
    [A, K] are the items of every rank's lists in the round.
    """

    users: Ids
    scores: npt.NDArray[np.float32]
    items: Ids
    items_of_all_ranks: Ids


def users_of_rank(users: Ids, user_rows: int, world: World) -> Ids:
    """The part of ``users`` (ascending) that this rank owns of a table of ``user_rows`` rows."""
    own = world.own_rows(user_rows)
    return users[np.searchsorted(users, own.start) : np.searchsorted(users, own.stop)]


@torch.no_grad()
def top_k_lists(
    user_RD: Tensor, users: Ids, search: Search, chunk: int, user_rows: int, world: World
) -> Iterator[TopKLists]:
    """Yield the best items over all ranks, ``chunk`` users of each rank per round. Collective:
    every rank must iterate to the end.

    A masked item scores -inf; it is listed only where a user has fewer than K other items.

    Args:
        user_RD: the vectors of the users that this rank owns.
        users: the users to rank for, some of those that this rank owns.
        user_rows: rows of the whole user table.
    """
    device, first = world.device, world.own_rows(user_rows).start
    counts = world.gather(torch.tensor([len(users)], device=device))[:, 0].tolist()
    for start in range(0, max(counts), chunk):
        size = min(chunk, max(counts) - start)
        some = users[start : start + size]
        row_B = torch.full((size,), -1, device=device)
        row_B[: len(some)] = torch.from_numpy(some)
        vector_BD = user_RD.new_zeros(size, user_RD.shape[1], device=device)
        vector_BD[: len(some)] = user_RD[torch.from_numpy(some - first)].to(device)
        row_A = world.gather(row_B).flatten().cpu().numpy()
        vector_AD = world.gather(vector_BD).flatten(0, 1)
        score_AK, item_AK = _merge_ranks(*search(vector_AD, row_A), world)
        mine = slice(world.rank * size, world.rank * size + len(some))
        scores, items = score_AK[mine].cpu().numpy(), item_AK.cpu().numpy()
        yield TopKLists(some, scores, items[mine], items[row_A >= 0])


def _merge_ranks(score_AK: Tensor, item_AK: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """The K best entries of all ranks' lists."""
    scores, items = (world.gather(part).transpose(0, 1).flatten(1) for part in (score_AK, item_AK))
    best_AK, place_AK = torch.topk(scores, score_AK.shape[1], dim=1)
    return best_AK.masked_fill(best_AK <= MASKED_SCORE, -torch.inf), items.gather(1, place_AK)


@dataclass(frozen=True)
class ExactSearch:
    """A :data:`Search` that scores every item that this rank owns, ``ITEMS_AT_A_TIME`` per product.

    Args:
        item_RD: vectors of the items that this rank owns.
        own: the table rows of these items.
        masks: interactions that must not be recommended.
        k: list length K.
        offset_R: added to the scores of these items.
        masked_users: only users below this row have masks.
    """

    item_RD: Tensor
    own: range
    masks: list[Interactions]
    k: int
    offset_R: Tensor | None = None
    masked_users: int = sys.maxsize

    def __call__(self, user_AD: Tensor, users: Ids) -> tuple[Tensor, Tensor]:
        row, item = self.masked_pairs(users)
        order = np.argsort(item)
        row, item = row[order], item[order]
        # Lists start as -inf, below MASKED_SCORE: an empty place never displaces a masked item.
        best_AK = user_AD.new_full((len(user_AD), self.k), -torch.inf)
        item_AK = torch.zeros_like(best_AK, dtype=torch.int64)
        # One buffer for all products: fresh memory costs more than the product.
        buffer = user_AD.new_empty(len(user_AD) * ITEMS_AT_A_TIME)
        for start in range(0, len(self.own), ITEMS_AT_A_TIME):
            score_AC = self._scores(user_AD, start, buffer)
            here = slice(*np.searchsorted(item, [start, start + score_AC.shape[1]]))
            at = (torch.from_numpy(part[here]).to(user_AD.device) for part in (row, item - start))
            score_AC[tuple(at)] = MASKED_SCORE
            piece_AK, column_AK = top_k(score_AC, self.k)
            items = torch.cat([item_AK, column_AK + (self.own.start + start)], 1)
            best_AK, place_AK = torch.topk(torch.cat([best_AK, piece_AK], 1), self.k, dim=1)
            item_AK = items.gather(1, place_AK)
        return best_AK, item_AK

    def _scores(self, user_AD: Tensor, start: int, buffer: Tensor) -> Tensor:
        """Scores [A, C] of the items from ``start`` on, a view of ``buffer``."""
        item_DC = self.item_RD[start : start + ITEMS_AT_A_TIME].to(user_AD.device).t()
        score_AC = buffer[: len(user_AD) * item_DC.shape[1]].view(len(user_AD), -1)
        if self.offset_R is None:
            return torch.mm(user_AD, item_DC, out=score_AC)
        offset_C = self.offset_R[start : start + ITEMS_AT_A_TIME].to(user_AD.device)
        return torch.addmm(offset_C, user_AD, item_DC, out=score_AC)

    def masked_pairs(self, users: Ids) -> tuple[Ids, Ids]:
        """The masked (user, item) pairs among this rank's items.

        Returns:
            Positions in ``users``, and items counted from this rank's first one.
        """
        real = np.flatnonzero((users >= 0) & (users < self.masked_users))
        pairs = [mask.of(users[real]) for mask in self.masks]
        row, item = (np.concatenate(side) for side in zip(*pairs, strict=True))
        mine = (item >= self.own.start) & (item < self.own.stop)
        return real[row[mine]], item[mine] - self.own.start


def top_k(score_BC: Tensor, k: int, bucket: int = 64) -> tuple[Tensor, Tensor]:
    """The k best columns of each row, best first: scores and columns [B, min(k, C)].

    Exact and faster than ``torch.topk`` on wide rows. It cuts the columns into buckets: the k
    buckets with the highest maxima hold the k best columns, so the costly selection sees k
    buckets instead of a whole row. It then repeats this with buckets of an eighth of the size.
    """
    rows, columns = score_BC.shape
    k = min(k, columns)
    buckets = -(-columns // bucket)
    if bucket < 8 or buckets <= 2 * k:
        best = torch.topk(score_BC, k, dim=1)
        return best.values, best.indices
    body = columns // bucket * bucket
    maximum = score_BC[:, :body].view(rows, -1, bucket).amax(2)
    if body < columns:
        maximum = torch.cat([maximum, score_BC[:, body:].amax(1, keepdim=True)], 1)
    chosen = torch.topk(maximum, k, dim=1, sorted=False).indices
    inside = torch.arange(bucket, device=score_BC.device)
    column = (chosen[:, :, None] * bucket + inside).view(rows, -1)
    candidate = score_BC.gather(1, column.clamp(max=columns - 1))
    if body < columns:
        candidate.masked_fill_(column >= columns, -torch.inf)
    values, place = top_k(candidate, k, bucket // 8)
    return values, column.gather(1, place)
