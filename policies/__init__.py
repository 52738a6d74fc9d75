"""Decisions: pure functions that answer yes, or no with a rule id and a sentence."""
