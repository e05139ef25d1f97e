"""Interactions from a known causal model, with its ground truth.

Preference: user u likes item i with probability sigmoid(p_u . q_i + b_i + c). The quality b_i
follows, weakly, the item's popularity: the two are confounded.
Exposure: an item's popularity g_i comes from its environment (a heavy-tailed campaign
budget), a user's activity a_u is heavy-tailed too; the biased log exposes (u, i) with
probability min(1, a_u g_i). An interaction is an exposed pair that is liked. The uniform log
exposes every pair with the same probability: the same tastes under do(exposure).

Shapes: U users, I items, K latent factors.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cnsdiff_dist.errors import UserError

Floats = npt.NDArray[np.float64]
Pairs = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
_CHUNK_PAIRS = 1 << 22


@dataclass(frozen=True)
class Synthetic:
    """Sizes and seed.

    ``biased_per_user`` and ``uniform_per_user`` are mean interactions; a user has at most a
    twentieth of the items in the biased log, so that in a small world likes are left to find.
    """

    users: int = 2000
    items: int = 1000
    seed: int = 0
    factors: int = 8
    environments: int = 4
    biased_per_user: float = 30.0
    uniform_per_user: float = 5.0


@dataclass(frozen=True)
class Truth:
    """The causal model. ``user_factors`` [U, K], ``item_factors`` [I, K], ``quality`` [I];
    ``activity`` [U] and ``popularity`` [I] scale the exposure; ``environment`` is int64 [I]."""

    user_factors: Floats
    item_factors: Floats
    quality: Floats
    activity: Floats
    popularity: Floats
    environment: npt.NDArray[np.int64]
    offset: float

    def preference(self, users: slice) -> Floats:
        """The probability that these users like each item, [rows, I]."""
        logits = self.user_factors[users] @ self.item_factors.T + self.quality + self.offset
        result: Floats = 1 / (1 + np.exp(-logits))
        return result

    def exposure(self, users: slice) -> Floats:
        """The probability that the biased log shows each item to these users, [rows, I]."""
        return np.minimum(1.0, self.activity[users, None] * self.popularity)


def draw_truth(world: Synthetic) -> Truth:
    """The causal model of a world; a pure function of it."""
    rng = _generator(world, 0)
    environment = rng.integers(0, world.environments, world.items)
    log_popularity = 0.9 * environment + rng.normal(0, 0.6, world.items)
    standard = (log_popularity - log_popularity.mean()) / max(log_popularity.std(), 1e-9)
    scale = 3.0 / np.sqrt(world.factors)
    truth = Truth(
        user_factors=rng.normal(0, 1, (world.users, world.factors)),
        item_factors=rng.normal(0, scale, (world.items, world.factors)),
        quality=0.3 * standard + rng.normal(0, 0.5, world.items),
        activity=rng.lognormal(0, 0.6, world.users),
        popularity=np.exp(log_popularity),
        environment=environment,
        offset=-3.0,
    )
    # Activity is scaled until liked and exposed pairs come to the wanted number; exposure
    # saturates at 1, hence the iteration.
    wanted = min(world.biased_per_user, 0.05 * world.items) * world.users
    for _ in range(20):
        expected = sum(
            float((truth.preference(part) * truth.exposure(part)).sum()) for part in _parts(world)
        )
        truth = replace(truth, activity=truth.activity * (wanted / max(expected, 1e-9)))
    return truth


def draw_interactions(world: Synthetic, truth: Truth) -> tuple[Pairs, Pairs]:
    """The biased and the uniform log, as (users, items) int64, with no pair in common."""
    rng = _generator(world, 1)
    liked = sum(float(truth.preference(part).sum()) for part in _parts(world))
    flat = min(1.0, world.uniform_per_user * world.users / liked)
    biased: list[Pairs] = []
    uniform: list[Pairs] = []
    for part in _parts(world):
        preference = truth.preference(part)
        likes = rng.random(preference.shape) < preference
        seen = likes & (rng.random(preference.shape) < truth.exposure(part))
        tried = likes & ~seen & (rng.random(preference.shape) < flat)
        for found, log in ((seen, biased), (tried, uniform)):
            rows, items = np.nonzero(found)
            log.append((rows + part.start, items))
    return _joined(biased), _joined(uniform)


def write_logs(world: Synthetic, folder: Path) -> dict[str, list[str]]:
    """Write the two raw logs as Parquet; return them as prepare's sources.

    Raises:
        UserError: the world is so small that a log is empty.
    """
    folder.mkdir(parents=True)
    sources = {}
    logs = draw_interactions(world, draw_truth(world))
    for split, (users, items) in zip(("train", "test_ood"), logs, strict=True):
        if len(users) == 0:
            raise UserError(
                f"--users {world.users} --items {world.items}: so small a world has no "
                "interactions; try 50 of each"
            )
        path = folder / f"{split}.parquet"
        pq.write_table(pa.table({"user": users, "item": items}), path)
        sources[split] = [str(path)]
    return sources


def write_truth(world: Synthetic, folder: Path) -> None:
    """Write the causal model: ``users.parquet`` and ``items.parquet``, by raw id, and
    ``model.parquet`` with its one constant, ``offset``."""
    truth = draw_truth(world)
    folder.mkdir(parents=True)
    tables: dict[str, dict[str, Any]] = {
        "users": {
            "id": np.arange(world.users),
            "factors": list(truth.user_factors),
            "activity": truth.activity,
        },
        "items": {
            "id": np.arange(world.items),
            "factors": list(truth.item_factors),
            "quality": truth.quality,
            "popularity": truth.popularity,
            "environment": truth.environment,
        },
        "model": {"offset": [truth.offset]},
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")


def _generator(world: Synthetic, stage: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([world.seed, stage])))


def _parts(world: Synthetic) -> list[slice]:
    step = max(1, _CHUNK_PAIRS // max(world.items, 1))
    return [slice(a, min(a + step, world.users)) for a in range(0, world.users, step)]


def _joined(parts: list[Pairs]) -> Pairs:
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
