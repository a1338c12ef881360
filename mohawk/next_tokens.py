"""Labels and positions of rows, under the name that other people's code imports them by."""

from mohawk.data.next_tokens import IGNORED, next_column, next_labels, positions

__all__ = ["IGNORED", "next_column", "next_labels", "positions"]
