"""Distils a long-context teacher into a student: recipes, data, training, export."""
