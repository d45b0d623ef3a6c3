"""What is built on training and prediction: comparing, checking and choosing labels, reporting, exporting."""
