"""Turn checkpoints into plain models, and plain models into gated checkpoints."""
