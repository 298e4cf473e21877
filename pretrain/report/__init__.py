"""One self-contained HTML page for a run or a sweep, and what the runs say about claims.

`from pretrain.report.write import write_report, results`; `from pretrain.report.claims import parse_claim`.
Reads the files of run and sweep folders; knows nothing of the trainer or the optimizers.
"""
