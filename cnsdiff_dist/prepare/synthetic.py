"""Generate interactions from a known causal model, and write its ground truth.

- Preference: user u likes item i with probability sigmoid(p_u . q_i + b_i + c). The quality b_i
  weakly follows the item's popularity, so that the two are confounded.
- Exposure: the biased log shows item i to user u with probability min(1, a_u g_i). The item's
  popularity g_i comes from its environment (a heavy-tailed campaign budget), and the user's
  activity a_u is heavy-tailed too.
- An interaction is a pair that is both shown and liked.
- The uniform log shows every pair with the same probability: the same tastes under do(exposure).

Shapes: U users, I items, F latent factors.
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
    """The sizes and the seed of a causal model.

    ``biased_per_user`` and ``uniform_per_user`` are mean numbers of interactions in the two logs.
    The biased mean is at most a twentieth of the items, so that a small model leaves likes for the
    uniform log.
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
    """The causal model.

    Attributes:
        user_factors: p, [U, F].
        item_factors: q, [I, F].
        quality: b, [I].
        activity: a, [U].
        popularity: g, [I].
        environment: int64 [I].
        offset: c.
    """

    user_factors: Floats
    item_factors: Floats
    quality: Floats
    activity: Floats
    popularity: Floats
    environment: npt.NDArray[np.int64]
    offset: float

    def preference(self, users: slice) -> Floats:
        """Return the probability that these users like each item, [users, I]."""
        logits = self.user_factors[users] @ self.item_factors.T + self.quality + self.offset
        result: Floats = 1 / (1 + np.exp(-logits))
        return result

    def exposure(self, users: slice) -> Floats:
        """Return the probability that the biased log shows these users each item, [users, I]."""
        return np.minimum(1.0, self.activity[users, None] * self.popularity)


def draw_truth(spec: Synthetic) -> Truth:
    """Draw the causal model: a pure function of ``spec``."""
    rng = _generator(spec, 0)
    environment = rng.integers(0, spec.environments, spec.items)
    log_popularity = 0.9 * environment + rng.normal(0, 0.6, spec.items)
    standard = (log_popularity - log_popularity.mean()) / max(log_popularity.std(), 1e-9)
    scale = 3.0 / np.sqrt(spec.factors)
    truth = Truth(
        user_factors=rng.normal(0, 1, (spec.users, spec.factors)),
        item_factors=rng.normal(0, scale, (spec.items, spec.factors)),
        quality=0.3 * standard + rng.normal(0, 0.5, spec.items),
        activity=rng.lognormal(0, 0.6, spec.users),
        popularity=np.exp(log_popularity),
        environment=environment,
        offset=-3.0,
    )
    return _scaled(spec, truth)


def _scaled(spec: Synthetic, truth: Truth) -> Truth:
    """Scale the activity until the biased log has the expected size that ``spec`` wants."""
    wanted = min(spec.biased_per_user, 0.05 * spec.items) * spec.users
    for _ in range(20):  # One division does not do, since exposure saturates at 1.
        expected = sum(
            float((truth.preference(part) * truth.exposure(part)).sum()) for part in _parts(spec)
        )
        truth = replace(truth, activity=truth.activity * (wanted / max(expected, 1e-9)))
    return truth


def draw_interactions(spec: Synthetic, truth: Truth) -> tuple[Pairs, Pairs]:
    """Draw the biased and the uniform log, as (users, items) int64, with no pair in common."""
    rng = _generator(spec, 1)
    liked = sum(float(truth.preference(part).sum()) for part in _parts(spec))
    flat = min(1.0, spec.uniform_per_user * spec.users / liked)
    biased: list[Pairs] = []
    uniform: list[Pairs] = []
    for part in _parts(spec):
        preference = truth.preference(part)
        likes = rng.random(preference.shape) < preference
        seen = likes & (rng.random(preference.shape) < truth.exposure(part))
        tried = likes & ~seen & (rng.random(preference.shape) < flat)
        for found, log in ((seen, biased), (tried, uniform)):
            rows, items = np.nonzero(found)
            log.append((rows + part.start, items))
    return _joined(biased), _joined(uniform)


def write_logs(spec: Synthetic, folder: Path) -> dict[str, list[str]]:
    """Write the two raw logs as Parquet.

    Returns:
        The sources for ``prepare``: the logs of each split.

    Raises:
        UserError: ``spec`` is so small that a log is empty.
    """
    folder.mkdir(parents=True)
    sources = {}
    logs = draw_interactions(spec, draw_truth(spec))
    for split, (users, items) in zip(("train", "test_ood"), logs, strict=True):
        if len(users) == 0:
            raise UserError(
                f"--users {spec.users} --items {spec.items}: so small a world has no "
                "interactions; try 50 of each"
            )
        path = folder / f"{split}.parquet"
        pq.write_table(pa.table({"user": users, "item": items}), path)
        sources[split] = [str(path)]
    return sources


def write_truth(spec: Synthetic, folder: Path) -> None:
    """Write the causal model as Parquet.

    ``users.parquet`` and ``items.parquet`` have a line per raw id, and ``model.parquet`` has the
    one constant, ``offset``.
    """
    truth = draw_truth(spec)
    folder.mkdir(parents=True)
    tables: dict[str, dict[str, Any]] = {
        "users": {
            "id": np.arange(spec.users),
            "factors": list(truth.user_factors),
            "activity": truth.activity,
        },
        "items": {
            "id": np.arange(spec.items),
            "factors": list(truth.item_factors),
            "quality": truth.quality,
            "popularity": truth.popularity,
            "environment": truth.environment,
        },
        "model": {"offset": [truth.offset]},
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")


def _generator(spec: Synthetic, stage: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([spec.seed, stage])))


def _parts(spec: Synthetic) -> list[slice]:
    """Slice the users, so that few enough pairs are in memory at a time."""
    step = max(1, _CHUNK_PAIRS // max(spec.items, 1))
    return [slice(a, min(a + step, spec.users)) for a in range(0, spec.users, step)]


def _joined(parts: list[Pairs]) -> Pairs:
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
