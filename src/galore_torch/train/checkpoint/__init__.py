"""What a run leaves to go on from: checkpoint folders, the run's lock, and the model in them."""
