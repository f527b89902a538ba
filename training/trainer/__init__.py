"""What the stages share around `transformers.Trainer`."""
