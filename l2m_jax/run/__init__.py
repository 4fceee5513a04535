"""A run: its context, its artefacts, and one module for each phase."""
