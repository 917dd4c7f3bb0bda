"""The statements that make the tables on MySQL and MariaDB, and upgrade those of older versions."""

BATCH_TABLE = """\
CREATE TABLE IF NOT EXISTS checkout_session_batch (
  id BIGINT UNSIGNED NOT NULL PRIMARY KEY,
  next_check_at DATETIME(3) NOT NULL,
  due_at DATETIME(3) NOT NULL,
  claimed_until DATETIME(3) NULL,
  checked_at DATETIME(3) NULL,
  KEY checkout_session_batch_due (due_at, checked_at)
) ENGINE=InnoDB"""

CHECK_TABLE = """\
CREATE TABLE IF NOT EXISTS checkout_session_check (
  rowid BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
  session_id {id_type} NOT NULL,
  batch_id BIGINT UNSIGNED NULL,
  next_check_at DATETIME(3) NULL,
  claimed_until DATETIME(3) NULL,
  first_seen_at DATETIME(3) NOT NULL,
  last_checked_at DATETIME(3) NULL,
  last_outcome VARCHAR(32) NULL,
  last_status_code SMALLINT NULL,
  consecutive_failures INT UNSIGNED NOT NULL DEFAULT 0,
  failing_since DATETIME(3) NULL,
  UNIQUE KEY checkout_session_check_session (session_id),
  KEY checkout_session_check_batch (batch_id, next_check_at, claimed_until),
  KEY checkout_session_check_waiting (failing_since, last_outcome)
) ENGINE=InnoDB"""

RUN_TABLE = """\
CREATE TABLE IF NOT EXISTS checkout_session_run (
  id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
  reason VARCHAR(16) NOT NULL,
  tick DATETIME(3) NULL,
  started_at DATETIME(3) NOT NULL,
  finished_at DATETIME(3) NULL,
  duration_ms INT UNSIGNED NOT NULL,
  open_sessions INT UNSIGNED NOT NULL,
  checked INT UNSIGNED NOT NULL,
  errors INT UNSIGNED NOT NULL,
  status_changes INT UNSIGNED NOT NULL,
  outcomes VARCHAR(1000) NOT NULL,
  skipped VARCHAR(1000) NOT NULL,
  overdue_ms BIGINT UNSIGNED NOT NULL,
  latency_p50_ms DOUBLE NULL,
  latency_p95_ms DOUBLE NULL,
  latency_p99_ms DOUBLE NULL,
  latency_max_ms DOUBLE NULL,
  settings VARCHAR(2000) CHARACTER SET ascii COLLATE ascii_bin NULL,
  unknown_words VARCHAR(2000) CHARACTER SET ascii COLLATE ascii_bin NULL,
  KEY checkout_session_run_finished (finished_at),
  KEY checkout_session_run_tick (tick)
) ENGINE=InnoDB"""

PAUSE_TABLE = """\
CREATE TABLE IF NOT EXISTS checkout_session_pause (
  id TINYINT UNSIGNED NOT NULL PRIMARY KEY,
  paused_until DATETIME(3) NOT NULL,
  pauses INT UNSIGNED NOT NULL,
  last_tick DATETIME(3) NULL,
  counts VARCHAR(2000) NULL,
  counted_at DATETIME(3) NULL,
  count_again_at DATETIME(3) NULL,
  budget VARCHAR(500) CHARACTER SET ascii COLLATE ascii_bin NULL
) ENGINE=InnoDB"""

CHANGE_TABLE = """\
CREATE TABLE IF NOT EXISTS checkout_session_change (
  id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
  session_id {id_type} NOT NULL,
  billing_checkout_id TEXT CHARACTER SET utf8mb4 NULL,
  new_status VARCHAR(16) NOT NULL,
  billing_status VARCHAR(255) CHARACTER SET utf8mb4 NOT NULL,
  changed_at DATETIME(3) NOT NULL,
  late_check_at DATETIME(3) NULL,
  paid_late_at DATETIME(3) NULL,
  KEY checkout_session_change_changed (changed_at),
  KEY checkout_session_change_late (late_check_at, changed_at),
  KEY checkout_session_change_paid_late (paid_late_at)
) ENGINE=InnoDB"""

MODIFY_ID = "ALTER TABLE {table} MODIFY session_id {id_type} NOT NULL"

HAS_BATCHES = ("batch_id", "YES")
# What upgrades a table of an earlier version, by the column it lacks (name, nullable).
UPGRADES = {
    ("checkout_session_check", ("rowid", "NO")): (
        "ALTER TABLE checkout_session_check DROP PRIMARY KEY,"
        " ADD COLUMN rowid BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY FIRST,"
        " ADD UNIQUE KEY checkout_session_check_session (session_id)"
    ),
    ("checkout_session_check", ("failing_since", "YES")): (
        "ALTER TABLE checkout_session_check ADD COLUMN failing_since DATETIME(3) NULL"
    ),
    ("checkout_session_run", ("finished_at", "YES")): (
        "ALTER TABLE checkout_session_run MODIFY finished_at DATETIME(3) NULL,"
        " ADD KEY checkout_session_run_tick (tick)"
    ),
    ("checkout_session_run", ("settings", "YES")): (
        "ALTER TABLE checkout_session_run ADD COLUMN settings"
        " VARCHAR(2000) CHARACTER SET ascii COLLATE ascii_bin NULL,"
        " ADD COLUMN unknown_words VARCHAR(2000) CHARACTER SET ascii COLLATE ascii_bin NULL"
    ),
    ("checkout_session_change", ("late_check_at", "YES")): (
        "ALTER TABLE checkout_session_change ADD COLUMN late_check_at DATETIME(3) NULL,"
        " ADD COLUMN paid_late_at DATETIME(3) NULL,"
        " ADD KEY checkout_session_change_late (late_check_at, changed_at),"
        " ADD KEY checkout_session_change_paid_late (paid_late_at)"
    ),
    ("checkout_session_pause", ("last_tick", "YES")): (
        "ALTER TABLE checkout_session_pause ADD COLUMN last_tick DATETIME(3) NULL,"
        " ADD COLUMN counts VARCHAR(2000) NULL, ADD COLUMN counted_at DATETIME(3) NULL,"
        " ADD COLUMN count_again_at DATETIME(3) NULL"
    ),
    ("checkout_session_pause", ("budget", "YES")): (
        "ALTER TABLE checkout_session_pause ADD COLUMN budget"
        " VARCHAR(500) CHARACTER SET ascii COLLATE ascii_bin NULL"
    ),
    # The column attempts and the keys checkout_session_check_due and checkout_session_check_failing
    # stay: workers of the version before use them until they end.
    ("checkout_session_check", HAS_BATCHES): (
        "ALTER TABLE checkout_session_check MODIFY next_check_at DATETIME(3) NULL,"
        " ADD COLUMN batch_id BIGINT UNSIGNED NULL,"
        " ADD KEY checkout_session_check_batch (batch_id, next_check_at, claimed_until),"
        " ADD KEY checkout_session_check_waiting (failing_since, last_outcome)"
    ),
}
