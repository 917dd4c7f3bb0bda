"""Standard output whose reader leaves before the monitor ends, as in `make run | head`."""

import logging
import os
import sys
import threading

from core.log import logger


def stop_without_reader(stopping: threading.Event) -> None:
    """Set `stopping` when a line of the log can no longer be written to a pipe."""
    handler = logger.registered_handler
    report = handler.handleError

    def handle_error(record: logging.LogRecord) -> None:
        if isinstance(sys.exception(), BrokenPipeError):
            discard()
            stopping.set()
        else:
            report(record)

    handler.handleError = handle_error  # type: ignore[method-assign]


def discard() -> None:
    """Discard the rest of the output, so that the monitor can stop as it does on Ctrl-C."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
