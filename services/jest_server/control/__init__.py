"""The REST view of what the stores know: jobs, models, queue, cache, dead letters, decisions."""
