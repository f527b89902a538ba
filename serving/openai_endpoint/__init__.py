"""An OpenAI-compatible server for one model; `deepseek-moe serve` starts it."""
