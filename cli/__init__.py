"""The deepseek-moe command: one thin file a subcommand."""
