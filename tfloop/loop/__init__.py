"""The loop: epochs over a source through an engine. It knows a model only by its steps."""
