"""Talking to one server: connections, what is said over them, and when."""
