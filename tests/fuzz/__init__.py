"""Fuzzing for longer than a test run: ``make fuzz``."""
