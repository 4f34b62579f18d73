"""The figures that the reference study claims, and where they exclude each other."""

from ._claims import STRATEGIES_OF_STUDY as STRATEGIES_OF_STUDY
from ._claims import Claim as Claim
from ._claims import list_claims as list_claims
from ._claims import load_claims as load_claims
from ._claims import table as table
from ._contradictions import contradictions as contradictions
from ._contradictions import is_beaten as is_beaten
