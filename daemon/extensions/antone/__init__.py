"""What the pack antone brings beside its rows: archiving."""
