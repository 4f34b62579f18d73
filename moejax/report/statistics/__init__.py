"""Statistics over draws of requests: intervals, paired effects and tests, interaction."""

from ._bootstrap import CONFIDENCE_RATIO as CONFIDENCE_RATIO
from ._bootstrap import NUM_RESAMPLES as NUM_RESAMPLES
from ._bootstrap import bootstrap_interval as bootstrap_interval
from ._bootstrap import percentile_interval as percentile_interval
from ._bootstrap import resamples as resamples
from ._interaction import Interaction as Interaction
from ._interaction import Source as Source
from ._interaction import interaction as interaction
from ._paired import LEVEL_RATIO as LEVEL_RATIO
from ._paired import Paired as Paired
from ._paired import compare_paired as compare_paired
from ._paired import holm as holm
