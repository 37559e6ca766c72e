"""The training loop, evaluation, measurements, and processes that train together."""
