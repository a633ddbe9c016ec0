"""Fine-tuning, distillation and short-term training."""
