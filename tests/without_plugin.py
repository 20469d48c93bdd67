"""Hide this package from foundry in a fresh interpreter, before foundry is imported."""

import importlib.metadata
import sys

import catalogue

found = catalogue.AVAILABLE_ENTRY_POINTS
found = [e for group in found.values() for e in group] if isinstance(found, dict) else found
others = [e for e in found if e.dist.name.replace("-", "_") != "llmfoundry_wesar"]
catalogue.AVAILABLE_ENTRY_POINTS = importlib.metadata.EntryPoints(others)
sys.modules["llmfoundry_wesar"] = None
