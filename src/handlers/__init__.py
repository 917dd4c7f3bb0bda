"""Lambda's entry points: `check` for the loop's ticks, `api` behind the API Gateway.

What both need is imported here, while the garbage collector is off: a cold start makes objects by
the ten thousand that stay, and looking through them for garbage takes a twelfth of its time.
"""

import gc

gc.disable()

import core.worker  # noqa: E402, F401

gc.freeze()
gc.enable()
