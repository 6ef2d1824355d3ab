"""Kernels: one file for each kind of step, with its code and a NumPy model of its arithmetic."""
