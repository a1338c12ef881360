"""`mohawk evaluate`: a student against its teacher once more."""
