"""The monitor's tables, one module each, and the report that reads them."""
