"""Recipes as files: reading, checking and naming what is wrong, before anything heavy is imported."""
