"""Floor 5: estimates of the memory, time and disk space of a job, made without a GPU."""
