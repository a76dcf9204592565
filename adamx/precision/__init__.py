"""What 16-bit parameters need to train: masters, or rounding without bias, or a warning."""
