"""Running the experiment and measuring the machine it runs on."""

from ._grid import GridSettings as GridSettings
from ._grid import run_grid as run_grid
from ._grid import simulate_lanes as simulate_lanes
from ._grid import summarise as summarise
from ._measure import measure_machine as measure_machine
from ._requests import Requests as Requests
from ._requests import batch_lookahead as batch_lookahead
from ._requests import check_shape as check_shape
from ._requests import draw_run as draw_run
from ._requests import learn as learn
from ._requests import open_requests as open_requests
from ._run import SCHEMA as SCHEMA
from ._run import run_bench as run_bench
