"""Who decides: agents that search for a pruning strategy. They know neither networks nor pruning."""
