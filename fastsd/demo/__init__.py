"""Floor 8: the whole story in miniature, and the tiny models it ships with."""
