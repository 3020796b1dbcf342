"""Phalanx's launcher: starts the workers of a job and sees them to their end."""
