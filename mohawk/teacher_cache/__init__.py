"""A teacher's answers, written once and read by many runs."""
