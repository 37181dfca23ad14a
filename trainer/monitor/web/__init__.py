"""A run in the browser: the report's charts and tables, live."""
