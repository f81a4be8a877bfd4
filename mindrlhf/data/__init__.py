"""Preference data: rows of text in, packed rows of tokens with reference log-probs out."""
