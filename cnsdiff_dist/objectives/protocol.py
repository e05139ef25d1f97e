"""What an objective is: from the scores of a row to its loss.

Shapes: B rows of this rank, N negatives of a row, its own and its pool's.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from cnsdiff_dist.sections import Objective as Settings


class Objective(ABC):
    """One ranking loss; ``objective.kind`` names it.

    To add one, write a file beside this one and list its class in ``registry.py``.
    """

    settings_type: ClassVar[type[Settings]]
    """The keys of this kind; its ``kind`` has a default."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abstractmethod
    def __call__(self, positive_B: Tensor, negative_BN: Tensor) -> Tensor:
        """The loss of each row, [B], from the logits of its positive and of its negatives.

        A logit of -inf leaves a negative out of the row.
        """
