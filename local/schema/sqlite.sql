-- The shop's table, for a trial on SQLite. The monitor needs these columns and the index.
CREATE TABLE IF NOT EXISTS checkout_session (
  id TEXT NOT NULL PRIMARY KEY,
  billing_checkout_id TEXT,
  billing_order_id TEXT,
  status VARCHAR(255) CHECK (status IN ('open', 'success', 'failure', 'timeout'))
);
CREATE INDEX IF NOT EXISTS checkout_session_status ON checkout_session (status);
