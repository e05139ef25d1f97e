"""Every sampler, by its ``negatives.kind``."""

from typing import Any

from cnsdiff_dist import sections
from cnsdiff_dist.samplers.ahns import AHNSSampler
from cnsdiff_dist.samplers.cnsdiff import CNSDiffSampler
from cnsdiff_dist.samplers.cnsdiff_published import PublishedSampler
from cnsdiff_dist.samplers.dens import DENSSampler
from cnsdiff_dist.samplers.dmns import DMNSSampler
from cnsdiff_dist.samplers.dns import DNSMNSampler, DNSSampler
from cnsdiff_dist.samplers.in_batch import InBatchSampler, MixedSampler
from cnsdiff_dist.samplers.mixgcf import MixGCFSampler
from cnsdiff_dist.samplers.popularity import PopularitySampler
from cnsdiff_dist.samplers.protocol import Sampler, Surroundings
from cnsdiff_dist.samplers.softmax import SoftmaxSampler
from cnsdiff_dist.samplers.srns import SRNSSampler
from cnsdiff_dist.samplers.uniform import UniformSampler

_ALL: tuple[type[Sampler[Any]], ...] = (
    UniformSampler,
    PopularitySampler,
    InBatchSampler,
    MixedSampler,
    DNSSampler,
    DNSMNSampler,
    SoftmaxSampler,
    MixGCFSampler,
    DENSSampler,
    AHNSSampler,
    SRNSSampler,
    DMNSSampler,
    PublishedSampler,
    CNSDiffSampler,
)
SAMPLERS = {entry.settings_type.model_fields["kind"].default: entry for entry in _ALL}


def make_sampler(settings: sections.Negatives, around: Surroundings) -> Sampler[Any]:
    return SAMPLERS[settings.kind](settings, around)
