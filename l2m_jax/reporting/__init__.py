"""What a run leaves to read: report, figures, tables and model cards."""
