"""WeSaR for llm-foundry: gated weights with one common initial scale, and callbacks that log their updates."""
