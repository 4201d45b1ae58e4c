"""Bundles and checkpoints on the Hugging Face hub: only what is missing moves, and nothing moves twice."""
