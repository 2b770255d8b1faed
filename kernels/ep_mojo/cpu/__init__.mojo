"""The stages for the host."""
