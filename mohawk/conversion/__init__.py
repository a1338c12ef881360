"""`mohawk convert`: from a Transformer to a hybrid, and which layers to convert."""
