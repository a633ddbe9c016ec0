"""Images and labels: one file for each source."""
