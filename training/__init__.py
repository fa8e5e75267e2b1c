"""The code that reproduces the numbers and the weights: ``python -m training COMMAND``, from a clone."""
