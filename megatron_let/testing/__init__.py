"""Test kit, shipped with the package and imported by nothing of it."""
