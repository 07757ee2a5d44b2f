"""Floor 8: the whole workflow in miniature, and the tiny models it ships with."""
