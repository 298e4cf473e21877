"""The run folder.

folder      paths and lock
manifest    what the run trains, and what each launch runs on
inputs      data and tokenizer, looked at before the start
data_lock   which files the remote sources consist of
identity    what must match on resume
resume      which checkpoint a launch starts from
reader      reads a run folder, for reports, sweeps and the command line
json_lines  metrics.jsonl and samples.jsonl
display     the progress display
wandb       step records to Weights & Biases
"""
