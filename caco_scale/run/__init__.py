"""A run's directory, records, telemetry, stop requests and diagnosis; knows nothing of what is trained."""
