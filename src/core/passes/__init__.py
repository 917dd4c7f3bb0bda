"""One pass: claim, check, decide, write; the shared pause, and how many workers a tick needs."""
