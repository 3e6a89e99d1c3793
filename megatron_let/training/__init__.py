"""The training program: what is built, the loop, what is logged and saved."""
