"""What a run shows and writes; knows nothing of how it searches."""
