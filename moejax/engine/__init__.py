"""Decoding with everything resident on the device: generation, and recording of its routing."""

from ._engine import Engine as Engine
from ._generate import Generation as Generation
from ._generate import RequestRouting as RequestRouting
from ._generate import Step as Step
from ._generate import Timing as Timing
from ._record import default_lookahead as default_lookahead
from ._record import record as record
from ._sampling import Sampling as Sampling
