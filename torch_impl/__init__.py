"""Distributed cross-attention in PyTorch: what people train with."""
