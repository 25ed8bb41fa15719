"""Tests, what they share (support), and programs that look at trained networks."""
