"""Inspecting transformations: cost, formula, compiled program, differences, logged runs."""
