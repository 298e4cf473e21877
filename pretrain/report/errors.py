"""Errors of reports."""

from __future__ import annotations

from pretrain.processes.errors import UserError


class ReportError(UserError):
    """A folder cannot be reported on, or the page cannot be written; one line per problem."""
