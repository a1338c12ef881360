"""Losses between layers: hidden states, attention and mixing matrices, relations, and which layers go together."""
