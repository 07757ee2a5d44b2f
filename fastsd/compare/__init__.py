"""Floor 8: pages over several runs, and the sweeps that make them."""
