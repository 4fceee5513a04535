"""A run: its context, its artefacts, and one module a phase."""
