"""Processes of a run: starting several, exit codes, errors."""
