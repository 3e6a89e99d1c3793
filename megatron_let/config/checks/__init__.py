"""Rules that a run's settings must keep, by subject. Each raises a ConfigError of one line."""
