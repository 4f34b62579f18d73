"""Mistakes a user can make, each with its cause, its cure and its exit code."""


class MoejaxError(Exception):
    """A failure told to the user as `error: cause`, an empty line, `hint: cure`.

    Args:
      cause: What is wrong, with the offending value.
      hint: What to do about it; empty when nothing useful can be said.
    """

    exit_code = 1

    def __init__(self, cause: str, hint: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.hint = hint


class UsageError(MoejaxError):
    """An option or argument that cannot be used as given."""

    exit_code = 2


class InfeasibleBudgetError(MoejaxError):
    """A memory budget that holds not even the smallest plan; the hint names the smallest one."""

    exit_code = 3


class BadFileError(MoejaxError):
    """A file that is missing, unreadable, corrupt or inconsistent with itself."""

    exit_code = 4


class BackendError(MoejaxError):
    """The accelerator is absent, refused the work or ran out of memory."""

    exit_code = 5
