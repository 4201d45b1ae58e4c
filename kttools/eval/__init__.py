"""Judging a model on tasks; adapters to other evaluation tools."""
