"""How slots are kept between steps: in float32, or in 2, 4 or 2 + 2 bytes, rounded without bias."""
