"""Normalizing flows in pure torch: layers by kind, and one file for each paper.

Importing the package costs no more than importing torch.
"""
