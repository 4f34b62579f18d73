"""The tuner: how many slots each layer gets in each memory tier, and what that is worth.

`tier_problem` states the question from a hit curve and a hardware profile, `tune` answers it with
a `Plan`. `devices_problem` and `tune_devices` do so for several devices that share the experts.
"""

from ._certainty import Certainty as Certainty
from ._certainty import certainty as certainty
from ._certainty import is_tie as is_tie
from ._devices_plan import DevicesPlan as DevicesPlan
from ._devices_plan import tune_devices as tune_devices
from ._devices_problem import DevicesProblem as DevicesProblem
from ._devices_problem import devices_problem as devices_problem
from ._devices_search import devices_step_s as devices_step_s
from ._plan import OBJECTIVES as OBJECTIVES
from ._plan import Plan as Plan
from ._plan import TierPlan as TierPlan
from ._plan import tune as tune
from ._problem import TierNumbers as TierNumbers
from ._problem import TierProblem as TierProblem
from ._problem import tier_problem as tier_problem
from ._step import Objective as Objective
from ._step import Prediction as Prediction
from ._step import Split as Split
from ._step import predict as predict
