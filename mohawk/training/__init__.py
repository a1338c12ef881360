"""Optimising any objective: the loop, its metrics and its progress."""
