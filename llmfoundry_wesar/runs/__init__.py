"""Read the logs of runs, draw figures and tables, and train a series of runs under equal conditions."""
