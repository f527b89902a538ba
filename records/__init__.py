"""What every run folder and every model folder stands on: records, summaries, statistics, loading, leak checks."""
