"""The comparison page: measured scores of several models next to published figures, and what the claims imply."""
