"""Floor 6: a run, from its config to the exported model.

loop, run, stage_start                        the sequence of a run
position, training_data, saving, evaluation   the objects a run consists of
log, report, sinks, header, cost, validation  its output and measurements
profiler                                      traces that the user requests
checkpoint, restart, export, model_card       the files it writes and resumes from
folder, settings                              readers of run folders and configs, for other commands
"""
