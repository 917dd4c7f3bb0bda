"""Pure values and decisions; imports nothing but the standard library."""
