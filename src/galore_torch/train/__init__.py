"""Training commands built on the optimizers: what `galore pretrain` does, in small files.

Floors inside this room, each imports only from those before it:
errors, schedule, muon, baselines, optim, contenders, model, hf_model, settings, config, recipes, flags,
corpus, tokenizer, data, checkpoint, resume, memory, result, trainer, report, display, pretrain. published/ holds the recipes' files.
Importing this package imports neither torch nor transformers; the functions that need them do.
"""
