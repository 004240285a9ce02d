"""Owns bytes and moves them between tiers; never asks what they mean."""
