"""What users construct: the optimizers, parameter groups, fused backward passes, quantised layers. No arithmetic."""
