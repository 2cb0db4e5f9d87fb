"""Photographs that do not fit in memory: read, decoded and cropped ahead of their use by Grain."""
