"""Training: data, objectives, rewards and the trainers of the three stages."""
