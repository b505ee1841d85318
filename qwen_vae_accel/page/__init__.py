"""One HTML page out of stored results: tables, charts, and a slider between pictures."""
