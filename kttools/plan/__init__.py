"""kttools plan: what a model takes on this machine or another, from headers and config.json alone."""
