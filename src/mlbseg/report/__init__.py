"""Pages that show what a run, masks or a bench came to: each one HTML file that needs nothing else."""
