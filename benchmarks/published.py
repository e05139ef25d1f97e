"""The arithmetic of the published CNSDiff code, as the baseline of our speed claim.

Written anew from a description of what that code computes (arXiv 2508.07243 and its
repository), in the plain way it computes it: COO propagation, coefficients gathered from
float64 arrays at every use, a full reverse chain per hardness level, Python loops over rows
and users. Its known defects are kept: they are part of the cost. What it computes and never
uses (the posterior's variances at every reverse step) is left out, and the Beta of the mix stays
where it starts, so the baseline is rather too cheap than too dear.

    python -m benchmarks.published --train train.txt [--evaluate test.txt]

times it alone on "user item 1" lines and prints JSON. B rows, D dimensions, N users + items.
"""

import argparse
import heapq
import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.published_diffusion import Denoiser, GaussianDiffusion

LAYERS, LEARNING_RATE, L2 = 2, 0.01, 1e-4
LEVELS = (10, 14, 18)
CONTRASTIVE, TEMPERATURE, NOISE = 0.3, 2.0, 0.01
DIFFUSION = 1e-6
BETA = (1.0, 9.0)
PARTS = ("sampling", "encoder", "diffusion", "generation", "ranking", "contrastive", "update")

Ints = npt.NDArray[np.int64]


def adjacency(user_items: Sequence[set[int]], users: int, items: int) -> Tensor:
    """D^-1/2 A D^-1/2 over users then items, sparse COO [N, N]."""
    pairs = np.array([(user, item) for user in range(users) for item in user_items[user]])
    rows = np.concatenate([pairs[:, 0], pairs[:, 1] + users])
    columns = np.concatenate([pairs[:, 1] + users, pairs[:, 0]])
    degree = np.bincount(rows, minlength=users + items).clip(min=1)
    values = (degree[rows] * degree[columns]) ** -0.5
    size = (users + items, users + items)
    index, value = torch.from_numpy(np.stack([rows, columns])), torch.from_numpy(values).float()
    return torch.sparse_coo_tensor(index, value, size, check_invariants=True).coalesce()


class PublishedStep:
    """One training step of the published code; ``parts`` holds seconds spent in each part.

    Args:
        user_items: the train items of every user.
        hidden: width of the denoiser.
    """

    def __init__(
        self,
        user_items: Sequence[set[int]],
        users: int,
        items: int,
        dim: int = 64,
        seed: int = 0,
        hidden: int = 64,
    ) -> None:
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        self.user_items, self.users, self.items = user_items, users, items
        self.user_table = nn.Parameter(nn.init.xavier_uniform_(torch.empty(users, dim)))
        self.item_table = nn.Parameter(nn.init.xavier_uniform_(torch.empty(items, dim)))
        self.optimizer = torch.optim.Adam([self.user_table, self.item_table], lr=LEARNING_RATE)
        self.denoiser = Denoiser(dim, hidden)  # never trained: no optimizer holds its parameters
        self.diffusion = GaussianDiffusion()
        self.adjacency = adjacency(user_items, users, items)
        self.mix = torch.distributions.Beta(torch.tensor(BETA[0]), torch.tensor(BETA[1]))
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.losses: dict[str, float] = {}  # of the last step

    def step(self, user: Ints, item: Ints) -> float:
        """Train on a batch of positives, int64 [B] each; the total loss."""
        with self._timed("sampling"):
            random_B = self.sample(user)
        user_B, item_B = torch.from_numpy(user), torch.from_numpy(item)
        with self._timed("encoder"):
            users_UD, items_ID = self.encode()
            user_BD, item_BD, random_BD = users_UD[user_B], items_ID[item_B], items_ID[random_B]
        with self._timed("diffusion"):
            diffusion = self.diffusion.loss(self.denoiser, item_BD)
        with self._timed("generation"), torch.no_grad():
            hard_BD = self.hardest(user_BD, item_BD)
        with self._timed("ranking"):
            mix_B1 = self.mix.sample(torch.Size([len(user), 1]))
            negative_BD = mix_B1 * hard_BD + (1 - mix_B1) * random_BD
            margin_B = (user_BD * (item_BD - negative_BD)).sum(dim=1)
            bpr = -torch.log(torch.sigmoid(margin_B)).mean()
            rows = self.user_table[user_B], self.item_table[item_B], self.item_table[random_B]
            norms = [row_BD.norm(p=2) / len(row_BD) for row_BD in rows]
            l2 = L2 * torch.stack(norms).sum() / len(user)
        with self._timed("contrastive"):
            contrastive = contrast(item_BD, torch.cat([hard_BD, random_BD]))
        with self._timed("update"):
            total = bpr + l2 + DIFFUSION * diffusion + CONTRASTIVE * contrastive
            self.optimizer.zero_grad()
            total.backward()
            self.optimizer.step()
        terms = {"bpr": bpr, "diffusion": diffusion, "contrastive": contrastive, "total": total}
        self.losses = {name: value.item() for name, value in terms.items()}
        return self.losses["total"]

    def sample(self, user: Ints) -> Tensor:
        """One uniform item per row that its user has not interacted with, int64 [B]."""
        chosen = []
        for row in user.tolist():
            item = self.random.randrange(self.items)
            while item in self.user_items[row]:
                item = self.random.randrange(self.items)
            chosen.append(item)
        return torch.tensor(chosen)

    def encode(self) -> tuple[Tensor, Tensor]:
        """LightGCN over the full graph: [U, D] and [I, D]."""
        layer_ND = torch.cat([self.user_table, self.item_table])
        layers = [layer_ND]
        for _ in range(LAYERS):
            layer_ND = torch.sparse.mm(self.adjacency, layer_ND)
            layers.append(layer_ND)
        mean_ND = torch.stack(layers, dim=1).mean(dim=1)
        users_UD, items_ID = torch.split(mean_ND, [self.users, self.items])
        return users_UD, items_ID

    def hardest(self, user_BD: Tensor, item_BD: Tensor) -> Tensor:
        """The candidate of each row that its user scores highest, [B, D]."""
        candidates = [self.diffusion.generate(self.denoiser, item_BD, level) for level in LEVELS]
        scores_BC = torch.stack(
            [torch.sigmoid((user_BD * candidate).sum(dim=1)) for candidate in candidates], dim=1
        )
        best_B11 = scores_BC.argmax(dim=1)[:, None, None]
        candidates_BCD = torch.stack(candidates, dim=1)
        return candidates_BCD.gather(1, best_B11.expand(-1, 1, candidates_BCD.shape[2]))[:, 0]

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.parts[part] += time.perf_counter() - start


def contrast(anchor_BD: Tensor, negatives_MD: Tensor) -> Tensor:
    """Noised anchors against all negatives; the positive is not in the denominator."""
    positive_BD = anchor_BD + NOISE * torch.randn_like(anchor_BD)
    positive_B = functional.cosine_similarity(anchor_BD, positive_BD, dim=1) / TEMPERATURE
    unit_BD, unit_MD = functional.normalize(anchor_BD), functional.normalize(negatives_MD)
    return -positive_B.mean() + torch.logsumexp(unit_BD @ unit_MD.T / TEMPERATURE, dim=1).mean()


def published_evaluation(
    user_emb: Tensor,
    item_emb: Tensor,
    train_csr: tuple[Ints, Ints],
    test_csr: tuple[Ints, Ints],
    k: int,
) -> float:
    """Mean recall@k over users with test items, user by user, train items masked.

    Args:
        user_emb, item_emb: [U, D] and [I, D].
        train_csr, test_csr: (indptr [U + 1], items [rows]).
    """
    (train_indptr, train_items), (test_indptr, test_items) = train_csr, test_csr
    recalls = []
    for user in range(len(user_emb)):
        wanted = set(test_items[test_indptr[user] : test_indptr[user + 1]].tolist())
        if not wanted:
            continue
        scores = (user_emb[user] @ item_emb.T).tolist()
        for item in train_items[train_indptr[user] : train_indptr[user + 1]].tolist():
            scores[item] = -1e8
        recalls.append(len(wanted & set(largest(scores, k))) / len(wanted))
    return sum(recalls) / len(recalls)


def largest(scores: list[float], k: int) -> list[int]:
    """The positions of the k highest scores, by a heap over the whole list."""
    heap = [(score, item) for item, score in enumerate(scores[:k])]
    heapq.heapify(heap)
    for item, score in enumerate(scores[k:], start=k):
        if score > heap[0][0]:
            heapq.heapreplace(heap, (score, item))
    return [item for _, item in heap]


def read_triples(path: Path) -> tuple[Ints, Ints]:
    """Users and items of ``user item 1`` lines."""
    table = np.loadtxt(path, dtype=np.int64, usecols=(0, 1), ndmin=2)
    return np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1])


def to_csr(user: Ints, item: Ints, users: int) -> tuple[Ints, Ints]:
    indptr = np.append(0, np.bincount(user, minlength=users).cumsum())
    return indptr, item[np.argsort(user, kind="stable")]


def to_sets(user: Ints, item: Ints, users: int) -> list[set[int]]:
    indptr, items = to_csr(user, item, users)
    return [set(part.tolist()) for part in np.split(items, indptr[1:-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the published arithmetic, alone.")
    parser.add_argument("--train", type=Path, required=True, help="lines of `user item 1`")
    parser.add_argument("--evaluate", type=Path, help="test lines; times one evaluation, K = 20")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=64, help="width of the denoiser")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    user, item = read_triples(options.train)
    test = read_triples(options.evaluate) if options.evaluate else (user[:0], item[:0])
    users = int(max(user.max(), test[0].max(initial=0))) + 1
    items = int(max(item.max(), test[1].max(initial=0))) + 1
    trainer = PublishedStep(to_sets(user, item, users), users, items, hidden=options.hidden)
    shuffle = np.random.default_rng(0)
    seconds = []
    for step in range(options.warmup + options.steps):
        if step == options.warmup:
            trainer.parts = dict.fromkeys(PARTS, 0.0)
        rows = shuffle.choice(len(user), options.batch, replace=len(user) < options.batch)
        start = time.perf_counter()
        trainer.step(user[rows], item[rows])
        seconds.append(time.perf_counter() - start)
    report = {
        "batch": options.batch,
        "hidden": options.hidden,
        "threads": options.threads,
        "steps": options.steps,
        "median_ms": round(1e3 * float(np.median(seconds[options.warmup :])), 1),
        "fastest_ms": round(1e3 * min(seconds[options.warmup :]), 1),
        "parts_ms": {name: round(1e3 * s / options.steps, 1) for name, s in trainer.parts.items()},
    }
    if options.evaluate:
        with torch.no_grad():
            embeddings = trainer.encode()
        train_csr, test_csr = to_csr(user, item, users), to_csr(*test, users)
        start = time.perf_counter()
        recall = published_evaluation(*embeddings, train_csr, test_csr, 20)
        report["evaluation_s"] = round(time.perf_counter() - start, 2)
        report["recall@20"] = round(recall, 4)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
