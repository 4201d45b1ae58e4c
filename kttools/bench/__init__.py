"""Benchmarks: the expert engine against this machine's ceilings, a whole model, and peers side by side."""
