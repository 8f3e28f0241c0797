"""What is told: plots of runs. Reads run folders, needs no torch."""
