"""Cues, their effects on text head and probe, and groups."""
