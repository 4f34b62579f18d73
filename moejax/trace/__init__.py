"""Routing traces: which experts every token of every request went to."""

from ._batch import batch_tokens as batch_tokens
from ._batch import batch_trace as batch_trace
from ._demand import demand_counts as demand_counts
from ._demand import known_ids as known_ids
from ._demand import next_use as next_use
from ._file import load_trace as load_trace
from ._file import save_trace as save_trace
from ._import import import_trace as import_trace
from ._named import TRACES as TRACES
from ._named import find_trace as find_trace
from ._named import trace_note as trace_note
from ._select import select_requests as select_requests
from ._select import split_profile as split_profile
from ._share import share_of as share_of
from ._statistics import TraceStatistics as TraceStatistics
from ._statistics import statistics as statistics
from ._trace import Trace as Trace
from ._trace import expert_dtype as expert_dtype
from ._trace import hash_experts as hash_experts
from ._trace import not_computed as not_computed
from ._validate import validate_trace as validate_trace
