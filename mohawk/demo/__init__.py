"""`mohawk demo`: a real checkpoint and text to try all of it on."""
