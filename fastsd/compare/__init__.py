"""Floor 8: pages that compare several runs, and the sweeps that train them."""
