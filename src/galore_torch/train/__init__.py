"""Training commands built on the optimizers: what `galore pretrain` does, in small files.

Floors inside this room, each imports only from those before it:
errors, schedule, muon, baselines, optim, contenders, model, hf_model, settings, config, recipes, flags, corpus, tokenizer,
data, place, checkpoint, resume, memory, result, measure, trainer, series, report, display, trackers, pretrain;
and for `galore report`, which needs no torch: errors, series, runs, chart_style, charts, html_report.
published/ holds the recipes' files.
Importing this package imports neither torch nor transformers; the functions that need them do.
"""
