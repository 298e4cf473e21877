"""Telemetry of the MLP neurons during training."""
