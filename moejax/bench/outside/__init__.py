"""Profiles and cost model beside measurements that no fit saw: those of others and our own."""

from ._compare import compare_profile as compare_profile
from ._decode import TARGET_RATIO as TARGET_RATIO
from ._decode import DecodeRow as DecodeRow
from ._decode import DecodeSummary as DecodeSummary
from ._decode import predict_decode as predict_decode
from ._decode import summarise_decode as summarise_decode
from ._explain import EXPLANATIONS as EXPLANATIONS
from ._explain import Explanation as Explanation
from ._explain import explain_decode as explain_decode
from ._own import OWN_RUNS as OWN_RUNS
from ._own import predict_own as predict_own
from ._own import summarise_own as summarise_own
from ._published import PublishedStep as PublishedStep
from ._published import Rig as Rig
from ._published import StoredModel as StoredModel
from ._published import read_decode as read_decode
from ._rates import RateRow as RateRow
from ._rates import predict_rates as predict_rates
from ._rates import summarise_rates as summarise_rates
