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
    """The database takes statements, but not these values: a CHECK, a key or a trigger says no."""


class StartWorkerError(MonitorError):
    """A worker could not be started; the message says why."""
