"""The search of a run, from the pruning problem to the results; read pipeline.py first."""
