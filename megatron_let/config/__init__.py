"""Settings of a run: frozen dataclasses by subject, and the command line generated from them."""
