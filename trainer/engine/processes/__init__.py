"""Processes of a run: the group they form, and what ends it when one of them fails."""
