"""Text that models write: answers for users, and data to learn from."""
