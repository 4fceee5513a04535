"""Report, figures, tables and model cards."""
