"""The processes of a run: launchers, environment, signals, exit codes, and how errors reach people."""
