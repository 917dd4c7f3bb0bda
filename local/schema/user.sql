-- The monitor's user, with no more rights than it needs.
CREATE USER monitor@'%' IDENTIFIED BY '…';
GRANT SELECT ON shop.checkout_session TO monitor@'%';
GRANT CREATE, SELECT, INSERT, UPDATE, DELETE ON shop.checkout_session_batch TO monitor@'%';
GRANT CREATE, ALTER, SELECT, INSERT, UPDATE, DELETE ON shop.checkout_session_check TO monitor@'%';
GRANT CREATE, SELECT, INSERT, UPDATE, DELETE ON shop.checkout_session_run TO monitor@'%';
GRANT CREATE, SELECT, INSERT, UPDATE, DELETE ON shop.checkout_session_pause TO monitor@'%';
GRANT CREATE, ALTER, SELECT, INSERT, UPDATE, DELETE ON shop.checkout_session_change TO monitor@'%';
-- Only for status updates:
GRANT UPDATE (status) ON shop.checkout_session TO monitor@'%';
