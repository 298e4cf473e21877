"""The models, their loss and their cost."""
