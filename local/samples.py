"""Sample sessions for the laptop's SQLite file: healthy ones, and examples of what can fail."""

import sqlite3
from pathlib import Path

SCHEMA = Path(__file__).parent / "schema" / "sqlite.sql"

# Session id and checkout id; the latter tells the simulated billing service what to do.
SAMPLES = (
    ("cart-1001", "checkout_active_1001"),
    ("cart-1002", "checkout_active_1002"),
    ("cart-1003", "checkout_active_1003"),
    ("cart-1004", "checkout_slow_1004"),
    ("cart-1005", "checkout_paid_30_1005"),
    ("cart-1006", "checkout_failed_60_1006"),
    ("cart-1007", "checkout_404_1007"),
    ("cart-1008", "checkout_500_1008"),
    ("cart-1009", "checkout_reset_1009"),
    ("cart-1010", "checkout_hang_1010"),
    ("cart-1011", None),
)


def create_samples(path: Path) -> bool:
    """Create the shop's table with sample sessions; returns False if the table exists.

    Raises:
        OSError, sqlite3.Error: the file cannot be created or is not an SQLite database.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    try:
        if connection.execute(
            "SELECT 1 FROM sqlite_master WHERE name = 'checkout_session'"
        ).fetchone():
            return False
        connection.executescript(SCHEMA.read_text(encoding="utf-8"))
        connection.executemany(
            "INSERT INTO checkout_session VALUES (?, ?, ?, 'open')",
            [
                (session_id, checkout_id, f"order-{session_id.removeprefix('cart-')}")
                for session_id, checkout_id in SAMPLES
            ],
        )
        connection.commit()
        return True
    finally:
        connection.close()
