"""`mohawk export`: students for other runtimes, proven equal."""
