"""Correcting the weights that remain after pruning."""
