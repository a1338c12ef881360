"""`mohawk inspect`, `verify` and `doctor`: what is there, and whether it is whole."""
