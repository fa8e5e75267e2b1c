"""What reproduces the numbers and the weights: one command each, ``python -m training.X``, from a clone."""
