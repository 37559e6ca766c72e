"""The commands of `galore`, each from checked words to its last line."""
