"""`galore plan`: the memory of a run before it runs."""
