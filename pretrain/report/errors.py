"""Errors of reports."""

from __future__ import annotations

from pretrain.processes.errors import UserError


class ReportError(UserError):
    """A folder that no report can be made of, or a page that cannot be written; one line per problem."""
