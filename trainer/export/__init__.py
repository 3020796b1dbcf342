"""Trained models in the formats that serve them, one module a format."""
