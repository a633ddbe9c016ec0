"""Strategies in, scores and costs out: candidates are pruned, repaired and scored here."""
