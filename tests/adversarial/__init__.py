"""Hostile inputs, f's, g's and surroundings: each ends in the right derivatives or in an error, never in silence."""
