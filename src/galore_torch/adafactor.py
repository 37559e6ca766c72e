"""Faces: a module name of galore-torch 1.0, kept for code that imports from it."""

from galore_torch.zoo import GaLoreAdafactor as Adafactor

__all__ = ["Adafactor"]
