"""How it is trained: optimizers by name, and the schedule of the learning rate."""
