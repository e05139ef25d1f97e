"""Every objective, by its ``objective.kind``."""

from cnsdiff_dist.objectives.bpr import BPR
from cnsdiff_dist.objectives.protocol import Objective
from cnsdiff_dist.objectives.softmax import Softmax
from cnsdiff_dist.sections import Objective as Settings

_ALL: tuple[type[Objective], ...] = (BPR, Softmax)
OBJECTIVES = {entry.settings_type.model_fields["kind"].default: entry for entry in _ALL}


def make_objective(settings: Settings) -> Objective:
    return OBJECTIVES[settings.kind](settings)
