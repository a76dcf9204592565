"""Wrappers around a whole optimizer, one in each file."""
