"""Sweeps: many runs of one configuration with other values of some parameters."""
