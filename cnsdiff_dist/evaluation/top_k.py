"""Top-K lists, items sharded over ranks.

Each rank searches its own items for everybody's users, and the ranks' lists are merged: no rank
holds the catalogue. Users are those that the rank owns, as in :meth:`World.own`.

Shapes: B users of a chunk, E of everybody's chunks, R own rows, C own items at a time, D
embedding dim, K list length.
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
from cnsdiff_dist.evaluation.metrics import top_k

Ids = npt.NDArray[np.int64]
ITEMS = 16_384  # scored at a time
MASKED = torch.finfo(torch.float32).min


def owned(users: Ids, of: int, world: World) -> Ids:
    """Those of some users (ascending) that this rank owns, of so many rows."""
    own = world.own(of)
    return users[np.searchsorted(users, own.start) : np.searchsorted(users, own.stop)]


@dataclass(frozen=True)
class Ranked:
    """Lists of this rank's ``users`` [B], best first: ``scores`` and ``items`` [B, K];
    ``everyones`` are the items of all ranks' lists of this round, [E, K]."""

    users: Ids
    scores: npt.NDArray[np.float32]
    items: Ids
    everyones: Ids


Search = Callable[[Tensor, Ids], tuple[Tensor, Tensor]]
"""Everybody's vectors [E, D] and their users, -1 where there is none, to the K best of this rank's
items for each, best first: scores and items [E, K]. What is no recommendation scores at most
``MASKED``."""


@torch.no_grad()
def rank(
    user_RD: Tensor, users: Ids, search: Search, chunk: int, of: int, world: World
) -> Iterator[Ranked]:
    """The best items of all ranks for some of the users that this rank owns of ``of`` users, up to
    ``chunk`` at a time. Collective: every rank iterates to the end.

    What ``search`` has masked scores -inf; it appears only where a user has fewer than K others.
    """
    device, first = world.device, world.own(of).start
    counts = world.gather(torch.tensor([len(users)], device=device))[:, 0].tolist()
    for start in range(0, max(counts), chunk):
        size = min(chunk, max(counts) - start)
        some = users[start : start + size]
        row_B1 = torch.full((size, 1), -1, device=device)
        row_B1[: len(some), 0] = torch.from_numpy(some)
        vector_BD = user_RD.new_zeros(size, user_RD.shape[1], device=device)
        vector_BD[: len(some)] = user_RD[torch.from_numpy(some - first)].to(device)
        everyone = world.gather(row_B1).flatten().cpu().numpy()
        vector_ED = world.gather(vector_BD).flatten(0, 1)
        score_EK, item_EK = _merged(*search(vector_ED, everyone), world)
        mine = slice(world.rank * size, world.rank * size + len(some))
        lists = item_EK.cpu().numpy()
        yield Ranked(some, score_EK[mine].cpu().numpy(), lists[mine], lists[everyone >= 0])


@dataclass(frozen=True)
class ExactSearch:
    """Scores every item that this rank owns (``own``, with vectors ``item_RD`` and what is added to
    their scores), piece by piece. What ``masks`` have of the first ``masking`` users is masked."""

    item_RD: Tensor
    own: range
    masks: list[Interactions]
    k: int
    offset_R: Tensor | None = None
    masking: int = sys.maxsize

    def __call__(self, user_ED: Tensor, users: Ids) -> tuple[Tensor, Tensor]:
        row, item = self.masked(users)
        order = np.argsort(item)
        row, item = row[order], item[order]
        # Filled up with -inf; a masked item scores more than that, so that it is never lost to it.
        best_EK = user_ED.new_full((len(user_ED), self.k), -torch.inf)
        item_EK = torch.zeros_like(best_EK, dtype=torch.int64)
        room_EC = user_ED.new_empty(
            len(user_ED) * ITEMS
        )  # fresh memory costs more than the product
        for start in range(0, len(self.own), ITEMS):
            score_EC = self._scores(user_ED, start, room_EC)
            here = slice(*np.searchsorted(item, [start, start + score_EC.shape[1]]))
            at = (torch.from_numpy(part[here]).to(user_ED.device) for part in (row, item - start))
            score_EC[tuple(at)] = MASKED
            piece_EK, column_EK = top_k(score_EC, self.k)
            items = torch.cat([item_EK, column_EK + (self.own.start + start)], 1)
            best_EK, place_EK = torch.topk(torch.cat([best_EK, piece_EK], 1), self.k, dim=1)
            item_EK = items.gather(1, place_EK)
        return best_EK, item_EK

    def _scores(self, user_ED: Tensor, start: int, room_EC: Tensor) -> Tensor:
        piece_DC = self.item_RD[start : start + ITEMS].to(user_ED.device).t()
        score_EC = room_EC[: len(user_ED) * piece_DC.shape[1]].view(len(user_ED), -1)
        if self.offset_R is None:
            return torch.mm(user_ED, piece_DC, out=score_EC)
        offset_C = self.offset_R[start : start + ITEMS].to(user_ED.device)
        return torch.addmm(offset_C, user_ED, piece_DC, out=score_EC)

    def masked(self, users: Ids) -> tuple[Ids, Ids]:
        """The masked pairs among this rank's items: positions in ``users``, and items counted
        from the first own one."""
        real = np.flatnonzero((users >= 0) & (users < self.masking))
        pairs = [mask.of(users[real]) for mask in self.masks]
        row, item = (np.concatenate(side) for side in zip(*pairs, strict=True))
        mine = (item >= self.own.start) & (item < self.own.stop)
        return real[row[mine]], item[mine] - self.own.start


def _merged(score_EK: Tensor, item_EK: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """The K best of all ranks' lists."""
    scores, items = (world.gather(part).transpose(0, 1).flatten(1) for part in (score_EK, item_EK))
    best_EK, place_EK = torch.topk(scores, score_EK.shape[1], dim=1)
    return best_EK.masked_fill(best_EK <= MASKED, -torch.inf), items.gather(1, place_EK)
