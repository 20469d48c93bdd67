"""WeSaR for llm-foundry: gated weights with one common initial scale, and what shows their updates."""
