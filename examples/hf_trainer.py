"""Hugging Face Trainer. Needs transformers and accelerate: python examples/hf_trainer.py"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from galore_torch import GaLoreAdamW8bit, fused_backward, galore_param_groups

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
LENGTH = 64

# Your model: LlamaForCausalLM.from_pretrained(...). Here a tiny one that reads bytes.
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=LENGTH,
    bos_token_id=None,
    eos_token_id=None,
)
model = LlamaForCausalLM(config)

# Your data: anything Trainer takes. Here torch's own source, cut into windows.
text = list(Path(torch.nn.functional.__file__).read_bytes())
data = [{"input_ids": text[i : i + LENGTH], "labels": text[i : i + LENGTH]} for i in range(0, len(text) - LENGTH, LENGTH)]

# optim="galore_adamw_8bit" would do too, but Trainer then drops every argument but rank, gap, scale and proj_type.
# Never the names that end in _layerwise: see docs/frameworks.md.
optimizer = GaLoreAdamW8bit(galore_param_groups(model, rank=16, update_proj_gap=50), lr=0.01, weight_decay=0.01)
fused_backward(model, optimizer)  # full gradients are freed as they are made; accumulation and clipping go on working

arguments = TrainingArguments(
    output_dir="trainer",
    max_steps=STEPS,  # the learning rate is the optimizer's: arguments name none
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    lr_scheduler_type="cosine",
    warmup_steps=STEPS // 10,
    max_grad_norm=1.0,
    dataloader_pin_memory=torch.cuda.is_available(),
    logging_steps=max(1, STEPS // 10),
    save_steps=STEPS,
    report_to="none",
)
trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))  # None: Trainer makes the scheduler
trainer.train()
