"""CoIN-mini: eight small tasks with CoIN's names, schema and answer styles, drawn from one visual world."""
