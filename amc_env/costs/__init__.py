"""What a strategy costs: one module per cost."""
