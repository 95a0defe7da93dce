"""Normalizing flows in pure torch: layers by kind, one file a paper. Importing it costs no more than torch."""
