"""Several processes that share one sweep, and end together when one of them fails.

JAX's distributed runtime brings them together and carries their signs of life. By itself it lets
a process that lost another wait for minutes, or ends it with a dump of its own; so every process
watches the others here, and one that was ended by the runtime is spoken for by its parent.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any, NoReturn

from moejax.errors import BackendError, MoejaxError, UsageError

from ._output import print_failure

AUTO = "auto"
_JOIN_S, _SILENT_S, _BEAT_S = 40, 20, 1.0
_NEVER_S = 10**6
_PARENT = "MOEJAX_SWEEP_PARENT"
_RESUME = "Finished shards are kept. Run all processes again with --resume."


class InterruptError(MoejaxError):
    """Somebody pressed Ctrl-C at one of the processes."""

    exit_code = 130


def supervise() -> int:
    """Runs this very command as a child and returns its exit code.

    The runtime may end a process at once when another is gone. Then the parent still has the
    last word.
    """
    command = [sys.executable, "-m", "moejax", *sys.argv[1:]]
    child = subprocess.Popen(command, env=os.environ | {_PARENT: str(os.getpid())})
    # A terminal sends its interrupt to both; the child decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    code = child.wait()
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    failure = BackendError(
        f"the runtime ended this process ({name}): process 0, or the way to it, is gone", _RESUME
    )
    print_failure(failure)
    return failure.exit_code


def is_supervised() -> bool:
    """Whether this process is such a child."""
    return _PARENT in os.environ


class Team:
    """The processes of one job.

    Attributes:
      process_id: Number of this one.
      num_processes: How many there are.
    """

    def __init__(self, process_id: int = 0, num_processes: int = 1, store: Any = None) -> None:
        self.process_id, self.num_processes = process_id, num_processes
        self._store = store
        if store is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def agree_on(self, digest: str) -> None:
        """Makes sure that all processes were given the same settings.

        Raises:
          UsageError: Process 0 has others.
          BackendError: It does not answer.
        """
        if self._store is None:
            return
        if self.process_id == 0:
            self._set("digest", digest)
            return
        if self._wait_for("digest") != digest:
            raise UsageError(
                f"process {self.process_id} was given other settings, another trace or another "
                "version than process 0",
                "Start all processes with the same command; only --process-id differs.",
            )

    def wait_for_start(self) -> None:
        """Waits until process 0 has made the folder."""
        if self._store is None:
            return
        if self.process_id == 0:
            self._set("start", "1")
        else:
            self._wait_for("start")

    def wait_for_all(self) -> None:
        """Says that this process is through, and waits until every other is."""
        if self._store is None:
            return
        self._set(f"done/{self.process_id}", "1")
        for other in range(self.num_processes):
            self._wait_for(f"done/{other}", _NEVER_S)

    def leave(self) -> None:
        """Ends the job: everything is gathered, and nobody is missed any more."""
        if self._store is None:
            return
        import jax

        if self.process_id == 0:
            self._set("gathered", "1")
        else:
            self._wait_for("gathered", _NEVER_S)
        jax.distributed.shutdown()

    def abort(self, error: Exception) -> NoReturn:
        """Tells the others what went wrong, and ends this process; alone, raises it again."""
        if self._store is None:
            raise error
        failure = error
        if not isinstance(failure, MoejaxError):
            first_line = next(iter(str(error).strip().splitlines()), "")
            failure = MoejaxError(f"{type(error).__name__}: {first_line}", _RESUME)
        with contextlib.suppress(Exception):
            self._set(f"failed/{self.process_id}", failure.cause)
        print_failure(failure)
        if self.process_id == 0:
            # The others hear of it through this process.
            time.sleep(3 * _BEAT_S)
        _end(failure.exit_code)

    def _watch(self) -> None:
        others = [number for number in range(self.num_processes) if number != self.process_id]
        last: dict[int, tuple[str, float]] = dict.fromkeys(others, ("", time.monotonic()))
        parent, beat = os.environ.get(_PARENT), 0
        while True:
            if parent is not None and str(os.getppid()) != parent:
                _end(BackendError.exit_code)
            beat += 1
            with contextlib.suppress(Exception):
                self._set(f"alive/{self.process_id}", str(beat))
            for other in others:
                cause = self._get(f"failed/{other}")
                if cause:
                    _stop(f"process {other} of {self.num_processes} failed: {cause}")
                sign, now = self._get(f"alive/{other}"), time.monotonic()
                if self._get(f"done/{other}") or sign not in ("", last[other][0]):
                    last[other] = (sign, now)
                elif now - last[other][1] > _SILENT_S:
                    _stop(f"process {other} of {self.num_processes} stopped answering")
            time.sleep(_BEAT_S)

    def _set(self, name: str, value: str) -> None:
        self._store.key_value_set(f"moejax/{name}", value, allow_overwrite=True)

    def _get(self, name: str) -> str:
        """What is stored; empty where nothing is, or nobody answers."""
        try:
            return self._store.key_value_try_get(f"moejax/{name}")
        except Exception:
            return ""

    def _wait_for(self, name: str, timeout_s: float = _JOIN_S) -> str:
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            if found := self._get(name):
                return found
            time.sleep(0.1)
        raise BackendError(f"process 0 did not say {name!r} in {timeout_s} s", _RESUME)


def join_team(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Team:
    """Joins the processes of a job; alone where no coordinator is named.

    Must come before anything else that JAX does.

    Args:
      coordinator: `host:port` of process 0, or `auto` where the cluster says all three.
      num_processes: How many there are.
      process_id: Number of this one.

    Raises:
      UsageError: One of the three is missing or out of range.
      BackendError: The coordinator cannot be reached, or the cluster is not known.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise UsageError(
                "--num-processes and --process-id need --coordinator",
                "Give host:port of process 0, or auto in a cluster that JAX knows.",
            )
        return Team()
    is_auto = coordinator == AUTO
    if not is_auto:
        _check_address(coordinator, num_processes, process_id)
    import jax
    from jax._src import distributed  # The store has no public name.

    try:
        jax.distributed.initialize(
            None if is_auto else coordinator,
            num_processes,
            process_id,
            initialization_timeout=_JOIN_S,
            # Processes watch each other; the runtime would only end them later and louder.
            heartbeat_timeout_seconds=_NEVER_S,
            shutdown_timeout_seconds=_JOIN_S,
        )
    except Exception as error:
        where = "the cluster" if is_auto else coordinator
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BackendError(
            f"no job could be joined at {where}: {first_line}",
            "Are all processes started, with the same --coordinator and --num-processes?",
        ) from error
    return Team(jax.process_index(), jax.process_count(), distributed.global_state.client)


def _check_address(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UsageError(
            f"--coordinator {coordinator!r} is not host:port", "For example localhost:1234."
        )
    if num_processes is None or process_id is None:
        raise UsageError(
            "--coordinator host:port needs --num-processes and --process-id",
            "Give both, or --coordinator auto in a cluster that JAX knows.",
        )
    if process_id >= num_processes:
        raise UsageError(
            f"--process-id {process_id} is out of range for {num_processes} process(es)",
            f"Give 0 to {num_processes - 1}.",
        )


def _stop(cause: str) -> NoReturn:
    failure = BackendError(cause, _RESUME)
    print_failure(failure)
    _end(failure.exit_code)


def _end(code: int) -> NoReturn:
    """Ends the process at once: nothing is torn down that another thread still uses."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
