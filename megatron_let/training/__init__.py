"""One run from command line to last checkpoint."""
