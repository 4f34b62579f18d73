"""The two simulators: exact ranks without a clock, and the timeline with one."""

from moejax.simulate._blocks import Stream as Stream
from moejax.simulate._blocks import stream as stream
from moejax.simulate._capacity import slots_within as slots_within
from moejax.simulate._hit_curve import HitCurve as HitCurve
from moejax.simulate._hit_curve import hit_curve as hit_curve
from moejax.simulate._hit_curve import lru_hit_curve as lru_hit_curve
from moejax.simulate._memory import num_passes as num_passes
from moejax.simulate._memory import replay_bytes as replay_bytes
from moejax.simulate._mesh import apart as apart
from moejax.simulate._mesh import spread_over as spread_over
from moejax.simulate._pool import pool as pool
from moejax.simulate._prefetch import PrefetchSchedule as PrefetchSchedule
from moejax.simulate._ranks import Counts as Counts
from moejax.simulate._ranks import Marks as Marks
from moejax.simulate._ranks import ranks as ranks
from moejax.simulate._replay import MAX_DEPTH as MAX_DEPTH
from moejax.simulate._replay import Replay as Replay
from moejax.simulate._replay import replay as replay
from moejax.simulate._sweep import by_target as by_target
from moejax.simulate._sweep import check_pool_strategies as check_pool_strategies
from moejax.simulate._sweep import step_means as step_means
from moejax.simulate._sweep import sweep as sweep
from moejax.simulate._sweep import sweep_pool as sweep_pool
from moejax.simulate._timeline import TIMELINE_OPTIONS as TIMELINE_OPTIONS
from moejax.simulate._timeline import Record as Record
from moejax.simulate._timeline import timeline as timeline
