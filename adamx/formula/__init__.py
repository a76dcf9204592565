"""Formulas as values: concepts write them, `summary` prints them, a test evaluates them."""
