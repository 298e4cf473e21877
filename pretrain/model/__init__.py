"""The models, their loss, and what they cost."""
