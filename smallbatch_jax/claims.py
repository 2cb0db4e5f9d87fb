"""The paper's written claims as checks on stored results."""
