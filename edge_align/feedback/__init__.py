"""Feedback: reading it in any known format, keeping it, and writing it out again."""
