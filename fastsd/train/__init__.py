"""Floor 2-3: precision, optimizers, objective, schedule, step, loop and checkpoints."""
