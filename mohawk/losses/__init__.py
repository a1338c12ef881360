"""What is learned from a teacher, for our runs and for other trainers."""
