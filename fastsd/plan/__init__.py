"""Floor 5: memory, time and disk of a job, before a GPU is touched."""
