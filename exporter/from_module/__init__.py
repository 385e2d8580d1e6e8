"""A user's own module as a step model: its states are lifted to inputs and outputs."""
