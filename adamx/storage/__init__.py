"""Storages of slots between steps: float32, or 2, 4 or 2 + 2 bytes, rounded without bias."""
