"""Standard output whose reader leaves before the monitor ends, as in `make run | head`."""

import logging
import os
import select
import stat
import sys
import threading

from core.log import logger


def stop_without_reader(stopping: threading.Event) -> None:
    """Set `stopping` when the reader of a pipe has left.

    The system says so at once; where it does not (macOS), the next line of the log finds out.
    """
    handler = logger.registered_handler
    report = handler.handleError

    def handle_error(record: logging.LogRecord) -> None:
        if isinstance(sys.exception(), BrokenPipeError):
            discard()
            stopping.set()
        else:
            report(record)

    handler.handleError = handle_error  # type: ignore[method-assign]
    if stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode):
        threading.Thread(
            target=_wait_for_reader_to_leave, args=(stopping,), name="reader", daemon=True
        ).start()


def _wait_for_reader_to_leave(stopping: threading.Event) -> None:
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)  # an error of the pipe is always reported
    pipe.poll()
    discard()
    stopping.set()


def discard() -> None:
    """Discard the rest of the output, so that the monitor can stop as it does on Ctrl-C."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
