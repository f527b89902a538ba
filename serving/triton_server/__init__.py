"""NVIDIA's Triton Inference Server for one model: its repository, its process and what watches over it."""
