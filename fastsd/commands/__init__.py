"""Floor 7: the commands beside `train`, `plan`, `bench`, `compare` and `demo`, a file each."""
