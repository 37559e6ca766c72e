"""Tensors in, tensors out: linear algebra, number formats, and how a weight is written. No optimizer, no state, no configuration."""
