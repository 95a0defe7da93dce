"""Time and memory, as ratios between models that take turns in one run; and stability."""
