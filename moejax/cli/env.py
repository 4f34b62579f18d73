"""`moejax env`: what this installation has to work with."""

from ._options import OutputOption
from ._output import OutputFormat, emit


def env(output: OutputOption = OutputFormat.table) -> None:
    """Show the versions, the device, and the cards, profiles, workloads and traces at hand.

    Example: moejax env -o json
    """
    from moejax.cards import HARDWARE, MODELS
    from moejax.results import capture_environment, to_plain
    from moejax.strategies import STRATEGIES
    from moejax.trace import TRACES
    from moejax.workloads import WORKLOADS

    record = to_plain(capture_environment())
    for field in ("argv", "seed"):
        del record[field]
    record["models"] = list(MODELS)
    record["hardware"] = list(HARDWARE)
    record["workloads"] = list(WORKLOADS)
    record["traces"] = list(TRACES)
    record["strategies"] = list(STRATEGIES)
    emit(record, output)
