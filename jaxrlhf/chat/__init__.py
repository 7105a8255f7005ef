"""A conversation with a model in the terminal: `jaxrlhf chat`."""
