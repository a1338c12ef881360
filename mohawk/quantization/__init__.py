"""`mohawk quantize`: a run's student with its weights in fewer bits."""
