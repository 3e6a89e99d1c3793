"""Spoilt input of every kind, made from honest input: used, or refused in one line."""
