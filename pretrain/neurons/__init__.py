"""What the MLP neurons do during training."""
