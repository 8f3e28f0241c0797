"""Attention and rotary position embeddings in the frequency domain."""
