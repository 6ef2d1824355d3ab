"""Training that imports no framework: recipe, schedule, settings."""
