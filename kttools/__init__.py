"""Offline toolkit: checkpoints to bundles, expert profiling, and the command line."""
