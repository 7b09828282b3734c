"""What pruning keeps, costs and brings, measured: scripts, each a command of its own. None is needed to train."""
