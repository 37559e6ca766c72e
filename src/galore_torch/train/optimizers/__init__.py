"""How it is trained: optimizers by name, Muon, and the schedule of the learning rate."""
