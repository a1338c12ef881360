"""Tokenizers: which one cuts a text, whether two read ids alike, and the bytes of their tokens."""
