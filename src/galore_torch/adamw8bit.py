"""A module name of galore-torch 1.0, kept for code that imports from it."""

from galore_torch.optim.galore import GaLoreAdamW8bit as AdamW8bit

__all__ = ["AdamW8bit"]
