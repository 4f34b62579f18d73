"""Decoding with all experts on the device, or with some: generation, and its routing recorded."""

from ._dense_model import KERNELS as KERNELS
from ._dense_model import DenseModel as DenseModel
from ._dense_model import prepare_model as prepare_model
from ._dense_model import spread_model as spread_model
from ._engine import Engine as Engine
from ._event import COUNTS as COUNTS
from ._event import ReplayTable as ReplayTable
from ._expert_cache import OffloadState as OffloadState
from ._generate import Generation as Generation
from ._generate import RequestRouting as RequestRouting
from ._generate import Step as Step
from ._generate import Timing as Timing
from ._offload import OffloadEngine as OffloadEngine
from ._programs import StepOutput as StepOutput
from ._record import default_lookahead as default_lookahead
from ._record import record as record
from ._sampling import Sampling as Sampling
from ._serve import NewToken as NewToken
from ._serve import Servable as Servable
from ._serve import Service as Service
from ._serve import serve as serve
