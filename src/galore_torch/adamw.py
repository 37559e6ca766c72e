"""A module name of galore-torch 1.0, kept for code that imports from it."""

from galore_torch.optim.galore import GaLoreAdamW as AdamW

__all__ = ["AdamW"]
