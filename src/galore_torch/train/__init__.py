"""Training commands built on the optimizers: what `galore pretrain` does, in small files.

Floors inside this room, each imports only from those before it:
errors, optim, model, config, corpus, tokenizer, data, checkpoint, resume, memory, result, trainer, report, display,
pretrain.
Importing this package imports neither torch nor transformers; the functions that need them do.
"""
