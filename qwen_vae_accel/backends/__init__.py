"""Ways to run the image networks: one small module each, found through :mod:`.registry`."""
