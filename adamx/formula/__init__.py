"""Formulas as values: concepts write theirs, `summary` prints them, a test evaluates them."""
