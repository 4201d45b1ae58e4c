"""Attention and everything dense on a device, routed experts on the CPU, neither waiting for the other.

docs/hybrid.md is the design. Devices are CUDA devices, or simulated ones on the CPU that run the same code.
"""
