"""Many runs: what they logged, figures, tables, and series under equal conditions."""
