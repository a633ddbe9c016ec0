"""Networks and their weights, one module per family."""
