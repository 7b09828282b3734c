"""`make demo`: questions made up from a seed, and a small BERT that learns them from scratch, dense and pruned."""
