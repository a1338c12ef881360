"""What a student is measured by."""
