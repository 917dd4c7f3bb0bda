"""The errors that people are told, each in one clear sentence.

    MonitorError
    ├── SettingsError       a setting cannot be used
    ├── StoreError          the database cannot be used
    │   └── RefusedError    the database works, but refuses these values
    └── StartWorkerError    a worker could not be started

Exceptions of libraries are translated where the library is called, and nowhere else. Anything else
that is raised is a bug.
"""


class MonitorError(Exception):
    """The message is one sentence for the operator, without a secret."""


class SettingsError(MonitorError, ValueError):
    """A setting that cannot be used. The message names it, what was given, and what is allowed."""


class StoreError(MonitorError):
    """The database cannot be used. The message says why, without the password."""


class RefusedError(StoreError):
    """The database can be used, but refuses a change: by a CHECK, a key, a trigger, a right.

    `of_any_row`: it would refuse the same change of every other row. `remedy`: what to do then, for
    an error that can also be about one row, where it would be wrong.
    """

    def __init__(self, message: str, *, of_any_row: bool = False, remedy: str = "") -> None:
        super().__init__(message)
        self.of_any_row = of_any_row
        self.remedy = remedy


class StartWorkerError(MonitorError):
    """A worker could not be started; the message says why."""
