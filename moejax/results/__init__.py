"""What a run leaves behind: measurements, their environment, and files written whole."""

from ._environment import Environment as Environment
from ._environment import capture_environment as capture_environment
from ._files import read_json as read_json
from ._files import write_bytes as write_bytes
from ._files import write_json as write_json
from ._files import write_text as write_text
from ._measurement import Measurement as Measurement
from ._plain import to_plain as to_plain
