"""What people see of a run: curves, progress lines, and where the time went."""
