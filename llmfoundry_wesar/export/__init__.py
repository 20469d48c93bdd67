"""Checkpoints in, plain models out, and back."""
