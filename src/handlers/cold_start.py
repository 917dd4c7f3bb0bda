"""Imports what both functions need while the garbage collector is off.

A cold start makes tens of thousands of objects that stay. Searching them for garbage takes a
twelfth of its time. Only Lambda's entry points import this module.
"""

import gc

gc.disable()

import core.worker  # noqa: E402, F401

gc.freeze()
gc.enable()
