"""`mohawk prune`: a smaller student by cutting and healing."""
