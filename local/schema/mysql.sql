-- The shop's table, for a trial on MySQL 8.0 and later or MariaDB 10.6 and later.
-- A real shop has its own. The monitor needs these columns and the index, and never alters it.
CREATE TABLE IF NOT EXISTS checkout_session (
  id VARCHAR(255) NOT NULL PRIMARY KEY,
  billing_checkout_id VARCHAR(255),
  billing_order_id VARCHAR(255),
  status VARCHAR(255) CHECK (status IN ('open', 'success', 'failure', 'timeout')),
  KEY checkout_session_status (status)
);
