"""Routed experts outside the device: how they are packed, where they wait, how many may enter."""

from ._layout import ExpertLayout as ExpertLayout
from ._layout import pack as pack
from ._layout import unpack as unpack
from ._plan import SCOPES as SCOPES
from ._plan import Scope as Scope
from ._plan import SlotPlan as SlotPlan
from ._plan import StoredPlan as StoredPlan
from ._plan import describe_cliff as describe_cliff
from ._plan import even_plan as even_plan
from ._plan import fixed_bytes as fixed_bytes
from ._plan import read_plan as read_plan
from ._store import ExpertStore as ExpertStore
from ._store import ReadLayer as ReadLayer
from ._store import build_store as build_store
from ._store import random_store as random_store
