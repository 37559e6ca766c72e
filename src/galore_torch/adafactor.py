"""A module name of galore-torch 1.0, kept for code that imports from it."""

from galore_torch.optim.galore import GaLoreAdafactor as Adafactor

__all__ = ["Adafactor"]
