"""Database engines behind one port; the SQL that runs on them is in `core.store`."""
