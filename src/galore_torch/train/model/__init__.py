"""What is trained: LLaMA by name, any causal language model of transformers, the baselines, and the loss."""
