"""Floor 0: what a command writes to the terminal."""
