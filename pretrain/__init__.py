"""Pretraining: config, model, data stream, engine, trainer, checkpoints and export."""
