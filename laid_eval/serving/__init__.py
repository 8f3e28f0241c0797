"""Models behind HTTP: vLLM started and stopped, its answers measured, lm-eval run on it."""
