"""Qwen1.5-MoE in Flax: the model, its weights, its tokenizer."""

from ._checkpoint import Checkpoint as Checkpoint
from ._checkpoint import find_checkpoint as find_checkpoint
from ._checkpoint import open_checkpoint as open_checkpoint
from ._config import QwenMoeConfig as QwenMoeConfig
from ._config import read_config as read_config
from ._config import write_config as write_config
from ._experts import EXPERTS as EXPERTS
from ._experts import choose_experts as choose_experts
from ._experts import experts as experts
from .modeling import KVCache as KVCache
from .modeling import Lookahead as Lookahead
from .modeling import QwenMoe as QwenMoe
from .modeling import RoutedExperts as RoutedExperts
from .modeling import Routing as Routing
from .modeling import abstract as abstract
from .modeling import empty_cache as empty_cache
