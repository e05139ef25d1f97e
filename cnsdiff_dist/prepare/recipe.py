"""What ``prepare`` is asked for, and the decisions that follow from that alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cnsdiff_dist import storage
from cnsdiff_dist.data.schema import SPLITS
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.prepare.log_formats import Log, LogFormat
from cnsdiff_dist.prepare.synthetic import Synthetic

TRAIN = SPLITS.index("train")


@dataclass(frozen=True)
class Recipe:
    """What to prepare.

    Attributes:
        out: the URL of the dataset directory to write.
        sources: the logs (URLs or globs) of each split.
        given: whether the sources are ready splits; then only validation is cut from train.
        shift: one of SHIFTS, or None for ready splits whose shift has no name.
        synthetic: if set, logs are generated and ``sources`` is ignored.
        min_rating: rows with a lower rating are dropped.
        test_fraction: of test_ood and of test_iid, each. Fractions are of the train rows that are
            left when a split is cut, in the order test_ood, test_iid, valid_ood, valid_iid.
        environments: the number of popularity buckets of items.
        drop_duplicates: keep the first of equal (user, item) pairs instead of refusing them.
        drop_unknown: drop the rows of ready splits whose ids are not in train, instead of
            refusing them.
        hashed_users: how many table rows the users with fewer than ``hashed_below`` train rows
            share; 0 gives every user a row.
        name: the name in the manifest; "" means the last part of ``out``.
        memory_limit: what DuckDB may use, such as ``4GB``.
    """

    out: str
    sources: dict[str, list[str]]
    given: bool = False
    shift: str | None = None
    synthetic: Synthetic | None = None
    log_format: LogFormat = field(default_factory=LogFormat)
    min_rating: float | None = None
    test_fraction: float = 0.2
    valid_fraction: float = 0.1
    valid_ood_fraction: float = 0.1
    environments: int = 5
    drop_duplicates: bool = False
    drop_unknown: bool = False
    hashed_users: int = 0
    hashed_below: int = 5
    name: str = ""
    seed: int = 0
    overwrite: bool = False
    memory_limit: str = "4GB"

    @property
    def dataset_name(self) -> str:
        """The name in the manifest."""
        return self.name or storage.display(self.out).rstrip("/").rpartition("/")[2]

    @property
    def cuts_future(self) -> bool:
        """Whether test_ood is the latest part of the log, which is cut before all other splits."""
        return not self.given and self.shift == "temporal"

    def cuts(self, sources: dict[str, list[str]]) -> list[tuple[str, str, float]]:
        """List the (split, shift, fraction) to cut from train, in order.

        A split that has logs in ``sources`` is left out, and so is test_ood if `cuts_future`.
        """
        shift = self.shift or "popularity"
        tests = [
            ("test_ood", shift, self.test_fraction),
            ("test_iid", "random", self.test_fraction),
        ]
        validations = [
            ("valid_ood", shift, self.valid_ood_fraction),
            ("valid_iid", "random", self.valid_fraction),
        ]
        if self.given:
            tests = []
        elif self.cuts_future:
            tests = tests[1:]
        return [cut for cut in tests + validations if cut[2] > 0 and cut[0] not in sources]

    def shift_entry(self) -> dict[str, str | int | float | None]:
        """Say how the splits were made: the ``shift`` entry of the manifest."""
        hashed = {"hashed_below": self.hashed_below} if self.hashed_users else {}
        return {
            "kind": self.shift or "given",
            "splits": "given" if self.given else "cut",
            "min_rating": self.min_rating,
            "test_fraction": None if self.given else self.test_fraction,
            "valid_fraction": self.valid_fraction,
            "valid_ood_fraction": self.valid_ood_fraction,
            "seed": self.seed,
            **hashed,
        }

    def check_columns(self, logs: Sequence[Log], splits: Sequence[int]) -> None:
        """Check that each log has the columns that its split needs.

        Args:
            splits: the split of each log, as an index into SPLITS.

        Raises:
            UserError: a log has no ratings or no timestamps, and they are needed.
        """
        cuts_by_time = not self.given or self.valid_ood_fraction > 0
        needs_time = self.shift == "temporal" and cuts_by_time
        for log, split in zip(logs, splits, strict=True):
            if self.min_rating is not None and "rating" not in log.roles:
                raise _no_column(log, "rating", "--min-rating")
            if needs_time and split == TRAIN and "timestamp" not in log.roles:
                otherwise = "; or choose --shift popularity"
                if self.given:
                    otherwise += " or --valid-ood-fraction 0"
                raise _no_column(log, "timestamp", "--shift temporal", otherwise)


def _no_column(log: Log, role: str, option: str, otherwise: str = "") -> UserError:
    return UserError(
        f"{storage.display(log.url)}: no {role} column, which {option} needs; its name goes in "
        f"--{role}-column{otherwise}"
    )
