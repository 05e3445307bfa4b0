"""Scoring and reporting: reads run folders, never a live trainer."""
