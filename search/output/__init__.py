"""What a run shows and writes; nothing here knows how it was searched."""
