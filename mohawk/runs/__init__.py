"""A run's folder: what it is bound to, what it keeps, what it reports and draws."""
