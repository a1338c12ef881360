"""Making models smaller: fewer layers, heads, channels."""
