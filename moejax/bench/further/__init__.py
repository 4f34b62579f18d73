"""What the experiment leaves open: cache sizes, cards, another model, K and top-k, hybrids."""

from ._further import run_further as run_further
from ._hybrids import HYBRIDS as HYBRIDS
