"""Training commands built on the optimizers: what `galore pretrain` does, in small files.

Its folders and which may import which: LAW in tests/test_import_law.py. config/published holds the recipes' files.
Importing this package imports neither torch nor transformers; the functions that need them do.
"""
