"""Cards: what is known about a model or a machine, with the source of every fact."""

from ._config import read_config as read_config
from ._fields import Fields as Fields
from ._hardware import CONSTANT_NAMES as CONSTANT_NAMES
from ._hardware import KINDS as KINDS
from ._hardware import Constant as Constant
from ._hardware import Hardware as Hardware
from ._hardware import Uncertainty as Uncertainty
from ._hardware import load_hardware as load_hardware
from ._load import load_model as load_model
from ._places import HARDWARE as HARDWARE
from ._places import MODELS as MODELS
from ._places import models_dir as models_dir
from ._places import read_card as read_card
from ._spec import DTYPE_BYTES as DTYPE_BYTES
from ._spec import ModelSpec as ModelSpec
