"""`mohawk distill`: from one or several teachers to a student, in stages."""
