"""Floor 7: one file for each command except `train`, `plan`, `bench`, `compare`, `sweep` and `demo`."""
