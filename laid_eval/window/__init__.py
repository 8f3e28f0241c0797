"""Effective context windows: haystacks, readers, design of the questions, the estimate."""
