"""What every other folder may lean on: errors, files, logs, random streams. No torch, no domain knowledge."""
