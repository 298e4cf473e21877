"""A self-contained HTML report for a run or a sweep, with verdicts on the sweep's claims.

`from pretrain.report.write import write_report, results`; `from pretrain.report.claims import parse_claim`.
It reads the files of run and sweep folders and does not depend on the trainer or the optimizers.
"""
