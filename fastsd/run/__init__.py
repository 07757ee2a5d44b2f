"""Floor 6: a run, from its config to the exported model.

loop, run, stage_start                        what happens, in order
position, training_data, saving, evaluation   what a run is made of
log, report, header, cost, validation         what it tells
checkpoint, restart, export, model_card       what it leaves, and goes on from
folder, settings                              the same, read by others
"""
