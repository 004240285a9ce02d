"""Prompts and their answers: what is asked, drawn and returned."""
